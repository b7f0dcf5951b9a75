"""Read every source file of this machine's Python standard library on four engines, and say what is in there.

    python examples/stdlib_survey.py

The parallel part is five lines in `main`: start a cluster, get a load-balanced view, map, wait, get.
"""

import ast
import os
import sysconfig
import time
import warnings
from collections import Counter
from pathlib import Path

import ipclite as ipp

ENGINES = 4
STDLIB = sysconfig.get_path("stdlib")


def survey(path):
    """Count what one source file holds. It runs on an engine; `{"error": ...}` if the file can't be parsed."""
    source = Path(path).read_bytes()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError) as e:
        return {"path": path, "error": f"{type(e).__name__}: {getattr(e, 'msg', e)}"}
    kinds, imports = Counter(), Counter()
    for node in ast.walk(tree):
        kinds[type(node).__name__] += 1
        if isinstance(node, ast.Import):
            imports.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            imports[node.module.partition(".")[0]] += 1
    return {"path": path, "lines": source.count(b"\n"), "imports": imports, "classes": kinds["ClassDef"],
            "functions": kinds["FunctionDef"] + kinds["AsyncFunctionDef"]}


def stdlib_files():
    """Paths of the standard library's sources, without packages that were installed later."""
    return [str(p) for p in sorted(Path(STDLIB).rglob("*.py")) if not {"site-packages", "dist-packages"} & set(p.parts)]


def report(found):
    """Print the totals."""
    good = [f for f in found if "error" not in f]
    bad = [f for f in found if "error" in f]
    imports = sum((f["imports"] for f in good), Counter())
    print(f"\n  files      {len(found):>9,}")
    for what in ("lines", "functions", "classes"):
        print(f"  {what:<10} {sum(f[what] for f in good):>9,}")
    print("  most imported: " + ", ".join(f"{name} ({n})" for name, n in imports.most_common(8)))
    if bad:
        print(f"  {len(bad)} could not be parsed:")
        for f in bad:
            print(f"    {os.path.relpath(f['path'], STDLIB)}: {f['error']}")


def main():
    """Survey with the cluster, then in this process alone, and compare."""
    paths = stdlib_files()
    megabytes = sum(len(Path(p).read_bytes()) for p in paths) / 1e6  # also brings the files into the disk cache
    print(f"{len(paths):,} source files, {megabytes:.1f} MB, in {STDLIB}")

    start = time.perf_counter()
    with ipp.Cluster(n=ENGINES) as rc:
        print(f"{len(rc)} engines ready after {time.perf_counter() - start:.2f} s")
        view = rc.load_balanced_view()
        start = time.perf_counter()
        result = view.map_async(survey, paths)
        result.wait_interactive()
        found = result.get()
        parallel = time.perf_counter() - start
    report(found)

    print("\nThe same in one process ...", flush=True)
    start = time.perf_counter()
    alone = [survey(path) for path in paths]
    serial = time.perf_counter() - start
    assert alone == found
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    print(f"  {ENGINES} engines on {cores} cores: {parallel:.1f} s; one process: {serial:.1f} s; "
          f"{serial / parallel:.1f} times as fast")


if __name__ == "__main__":
    main()
