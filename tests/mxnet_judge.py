"""Real MXNet reads and writes records: run by tests/test_mxnet.py in an environment of its own.

    python mxnet_judge.py read SETS.json      {name: path of a .rec} -> what MXNet sees, as JSON
    python mxnet_judge.py write SPEC.json     {path of a .rec: [record, ...]} -> files

A record is {"key", "label" (number or list), "id", "id2", "image" (hexadecimal)}.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import mxnet
import numpy


def read(path_rec):
    """Every record that the index lists, as MXNet unpacks it, and the number a plain scan finds."""
    path = Path(path_rec)
    indexed = mxnet.recordio.MXIndexedRecordIO(str(path.with_suffix(".idx")), str(path), "r")
    records = []
    for key in indexed.keys:
        header, image = mxnet.recordio.unpack(indexed.read_idx(key))
        records.append(
            {
                "key": int(key),
                "flag": int(header.flag),
                "label": numpy.atleast_1d(header.label).astype(float).tolist(),
                "id": int(header.id),
                "id2": int(header.id2),
                "sha1": hashlib.sha1(image).hexdigest(),
                "shape": shape_of(image),
            }
        )
    plain = mxnet.recordio.MXRecordIO(str(path), "r")
    scanned = 0
    while plain.read() is not None:
        scanned += 1
    return {"records": records, "scanned": scanned}


def shape_of(image):
    """Height, width and channels, decoded by MXNet; None for what is no JPEG."""
    if image[:2] != b"\xff\xd8":
        return None
    return list(mxnet.image.imdecode(image).shape)


def write(path_rec, records):
    path = Path(path_rec)
    out = mxnet.recordio.MXIndexedRecordIO(str(path.with_suffix(".idx")), str(path), "w")
    for record in records:
        header = mxnet.recordio.IRHeader(0, record["label"], record["id"], record["id2"])
        image = bytes.fromhex(record["image"])
        out.write_idx(record["key"], mxnet.recordio.pack(header, image))
    out.close()


def main():
    command, path = sys.argv[1:]
    spec = json.loads(Path(path).read_text())
    if command == "read":
        print(json.dumps({name: read(rec) for name, rec in spec.items()}))
    else:
        for rec, records in spec.items():
            write(rec, records)


if __name__ == "__main__":
    main()
