"""One cold reading in a process of its own: prints its parts as JSON (see `measure.cold_start`)."""

from __future__ import annotations

import json
import sys
import time


def main() -> None:
    """Read one film with one bundle and print milliseconds and peak memory."""
    bundle, film, threads, device = sys.argv[1:]
    started = time.perf_counter()
    from cxrgaze.runtime.host import peak_memory_bytes
    from cxrgaze.runtime.reader import load

    imported = time.perf_counter()
    with load(bundle, device, threads=int(threads)) as reader:
        loaded = time.perf_counter()
        reader.read(film)
        done = time.perf_counter()
        parts = {
            "import_ms": (imported - started) * 1e3,
            "load_ms": (loaded - imported) * 1e3,
            "first_reading_ms": (done - loaded) * 1e3,
            "peak_memory_bytes": peak_memory_bytes(),
        }
    print(json.dumps(parts))


if __name__ == "__main__":
    main()
