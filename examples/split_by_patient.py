"""A second split of a labelled table: by the order of the patients' numbers, within their labels.

    python examples/split_by_patient.py labels.csv > by_patient.csv

In many collections a patient's number tells when or where the film was taken. A random split mixes
that; here the test films are of the patients with the greatest numbers. `cxrgaze-train prepare`
takes the column `split` as it is.
"""

import csv
import sys

with open(sys.argv[1], newline="") as table:
    rows = list(csv.DictReader(table))
labels: dict[int, set[str]] = {}
for row in rows:
    labels.setdefault(int(row["patient"]), set()).add(row["label"])
groups: dict[str, list[int]] = {}
for patient in sorted(labels):
    groups.setdefault("|".join(sorted(labels[patient])), []).append(patient)
place = {p: i / len(alike) for alike in groups.values() for i, p in enumerate(alike)}
for row in rows:
    share = place[int(row["patient"])]
    row["split"] = "train" if share < 0.6 else "val" if share < 0.75 else "test"
out = csv.DictWriter(sys.stdout, rows[0], lineterminator="\n")
out.writeheader()
out.writerows(rows)
