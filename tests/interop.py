#!/usr/bin/env python3
"""Prints who served whom: interop.py JUNIT

The matrix is the one of docs/interop.md. Where a row names a test, or several by a
pattern, the result is what the test runner reported in JUNIT; elsewhere the reason is
the row's own.
"""

import fnmatch
import os
import pathlib
import re
import sys
import xml.etree.ElementTree as ElementTree

NOT_RUN = "not run"
HEADINGS = ["front end", "back end", "what", "shown by, or why not"]


def rows():
    page = pathlib.Path(__file__).parent.parent / "docs" / "interop.md"
    inside = False
    for line in page.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            inside = False
        elif cells == HEADINGS:
            inside = True
        elif inside and not line.startswith("|--"):
            yield cells


def results(junit):
    """Whether each test passed, by `binary::test`."""
    found = {}
    for suite in ElementTree.parse(junit).getroot().iter("testsuite"):
        binary = suite.get("name").split("::")[-1]
        for case in suite.iter("testcase"):
            failed = case.find("failure") is not None or case.find("error") is not None
            found[f"{binary}::{case.get('name')}"] = not failed
    return found


def verdict(cell, passed):
    patterns = re.findall(r"`([^`]+::[^`]+)`", cell)
    if not patterns:
        return cell
    # A row must not outlive its test: with every test there is, a name finds one.
    named = [name for name in passed if any(fnmatch.fnmatchcase(name, p) for p in patterns)]
    if not named:
        return NOT_RUN
    failed = [name for name in named if not passed[name]]
    return f"FAIL: {', '.join(failed)}" if failed else f"pass ({len(named)} tests)"


def main():
    try:
        passed = results(sys.argv[1])
    except OSError as error:
        sys.exit(f"interop.py: no results: {error}")
    table = [(*row[:3], verdict(row[3], passed)) for row in rows()]
    if not table:
        sys.exit("interop.py: docs/interop.md has no matrix")
    widths = [max(len(row[column]) for row in table) for column in range(3)]
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)), row[3], sep="  ")
    missing = [row for row in table if row[3] == NOT_RUN]
    if missing and os.environ.get("OUTRIGGER_SKIP_KVM") != "1":
        sys.exit(f"interop.py: docs/interop.md names tests that are not there: {missing}")


main()
