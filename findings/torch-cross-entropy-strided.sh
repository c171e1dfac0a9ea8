#!/usr/bin/env bash
# torch: cross_entropy on a CPU is off by 2e-4 nats for large vocabularies, always to the same side.
#
# Surprise: its documented shape for sequences, [batch vocabulary time], is a transposed view of what a language model gives, and
#   sums over that strided axis lose much in float32. With 151,936 classes losses come out too low by 2e-4 on average, at all
#   positions, so that more text does not help; logsumexp over the same logits is more than a hundred times nearer. Flattened to
#   [tokens vocabulary] cross_entropy has about a tenth of that error, to the same side.
# Versions: torch 2.13.0, CPU.
# Seen (the last digits depend on the processor and its threads):
#   torch 2.13.0+cpu, 64 positions, 151,936 classes; error against float64 in nats: largest, mean, positions too low
#   cross_entropy, [1 151936 64]:  3.4e-04, -2.2e-04, 64
#   cross_entropy, [64 151936]:    3.3e-05, -1.3e-05, 64
#   logsumexp - logit:             1.7e-06, -1.2e-07, 40
# To users: take logsumexp to compare losses that differ by less than 1e-3 nats, as ablation of one head makes them.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0
"$folder/env/bin/python" -W ignore - <<'END'
import sys

import torch
from torch.nn.functional import cross_entropy

TIME, CLASSES = 64, 151936
torch.manual_seed(0)
logits = torch.randn(TIME, CLASSES) * 3
targets = torch.randint(CLASSES, (TIME,))
exact = cross_entropy(logits.double(), targets, reduction="none")
strided = cross_entropy(logits[None].transpose(1, 2), targets[None], reduction="none")[0]
flat = cross_entropy(logits, targets, reduction="none")
direct = logits.logsumexp(1) - logits.gather(1, targets[:, None])[:, 0]

print(f"torch {torch.__version__}, {TIME} positions, {CLASSES:,} classes; error against float64 in nats: largest, mean, positions too low")
found = {}
for name, losses in {
    f"cross_entropy, [1 {CLASSES} {TIME}]:": strided,
    f"cross_entropy, [{TIME} {CLASSES}]:": flat,
    "logsumexp - logit:": direct,
}.items():
    errors = losses.double() - exact
    found[name] = float(errors.abs().max()), float(errors.mean()), int((errors < 0).sum())
    print(f"{name:<30} {found[name][0]:.1e}, {found[name][1]:+.1e}, {found[name][2]}")
(largest, mean, _), _, (best, *_) = found.values()
if largest < 20 * best or mean > -5e-5:
    sys.exit("changed: cross_entropy over a strided axis is not that far off")
END
