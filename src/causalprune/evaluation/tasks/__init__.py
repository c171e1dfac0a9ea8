"""Benchmarks, one task file of lm-evaluation-harness each, and how final answers are read.

`metadata` of a task file holds what the harness does not know: `source` (a data set of
`causalprune.calibration.data`; without it the harness loads `dataset_path` itself), `chat` (`auto`, `on`, `off`)
and `answer` (`number`, `number_comma`, `yes_no`, `letter`, `text` or `regex:PATTERN`: how the final answer is found in a generated text;
without it the file's own filters and metrics apply).
"""
