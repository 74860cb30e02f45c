"""Write the pages that are generated from the code, or with --check fail when one is out of date."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from aligntune.backends.matrix import backends_page
from aligntune.config.reference import json_schema, reference_page
from aligntune.rewards import table as rewards

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "benchmarks"))

import tables  # noqa: E402  (benchmarks are scripts, not a package)

PAGES = {
    "docs/reference.md": reference_page,
    "docs/backends-matrix.md": backends_page,
    "docs/run.schema.json": lambda: json.dumps(json_schema(), indent=1) + "\n",
    "docs/rewards.md": lambda: "# Rewards\n\n" + rewards.INTRO + rewards.markdown() + "\n",
    "benchmarks/README.md": tables.page,
}


def main() -> int:
    stale = []
    for name, make in PAGES.items():
        path, text = ROOT / name, make()
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        stale.append(name)
        if "--check" not in sys.argv:
            path.write_text(text, encoding="utf-8")
    if stale and "--check" in sys.argv:
        print(f"out of date: {', '.join(stale)}; run python scripts/generated.py")
        return 1
    print(f"wrote {', '.join(stale)}" if stale else "generated pages are up to date")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
