"""End files in one newline and their lines in no space; exits with 1 if any changed."""

import re
import sys
from pathlib import Path

changed = []
for path in map(Path, sys.argv[1:]):
    old = path.read_bytes().decode()
    lines = re.sub(r"[ \t]+(?=\r?\n)", "", old).rstrip()
    new = lines + "\n" if lines else ""
    if new != old:
        path.write_bytes(new.encode())
        changed.append(str(path))
print("\n".join(changed))
sys.exit(bool(changed))
