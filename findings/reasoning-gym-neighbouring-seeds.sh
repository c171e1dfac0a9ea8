#!/usr/bin/env bash
# reasoning-gym: data sets of neighbouring seeds are nearly the same data set.
#
# Surprise: problem i is drawn with seed + i. Two sets whose seeds differ by 1 have all problems but one in common, moved by
#   one place. It is so for chain_sum, leg_counting and countdown; gsm_symbolic chooses its templates apart, and shares few.
# Versions: reasoning-gym 0.1.25.
# Seen:
#   reasoning-gym 0.1.25
#   chain_sum: 50 problems of seed 0 and 50 of seed 1, 49 the same
#   leg_counting: 50 problems of seed 0 and 50 of seed 1, 49 the same
#   countdown: 50 problems of seed 0 and 50 of seed 1, 49 the same
#   chain_sum: seeds 0 and 50, 0 the same
# To users: seed 0 to train and seed 1 to test means to test on what was trained on; set seeds apart by more than the size.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check reasoning-gym==0.1.25
"$folder/env/bin/python" -W ignore - <<'END'
import sys
from importlib.metadata import version

import reasoning_gym

SIZE = 50


def problems(name, seed):
    return [row["question"] for row in reasoning_gym.create_dataset(name, size=SIZE, seed=seed)]


print("reasoning-gym", version("reasoning-gym"))
for name in ("chain_sum", "leg_counting", "countdown"):
    first, second = problems(name, 0), problems(name, 1)
    same = len(set(first) & set(second))
    print(f"{name}: {SIZE} problems of seed 0 and {SIZE} of seed 1, {same} the same")
    if first[1:] != second[:-1]:
        sys.exit(f"changed: {name} of seed 1 is no longer {name} of seed 0 moved by one place")
far = len(set(problems("chain_sum", 0)) & set(problems("chain_sum", SIZE)))
print(f"chain_sum: seeds 0 and {SIZE}, {far} the same")
if far:
    sys.exit("changed: seeds that are the size apart share problems")
END
