from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def made() -> ModuleType:
    """`dicom_files.py`: makers of DICOM files and slow references."""
    path = Path(__file__).with_name("dicom_files.py")
    spec = importlib.util.spec_from_file_location("dicom_files", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
