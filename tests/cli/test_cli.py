import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Run, assert_refused
from families import FAMILIES
from tinydata import tiny_decoder, write_jsonl
from transformers import (
    BertConfig,
    BertForMaskedLM,
    RwkvConfig,
    RwkvForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from causalprune.cli.app import main
from causalprune.evaluation.results import read_json

COMMANDS = (
    "inspect",
    "data",
    "attribute",
    "stability",
    "prune",
    "sweep",
    "shrink",
    "evaluate",
    "compare",
    "verify",
    "reapply",
    "merge",
    "report",
    "effects",
    "run",
    "demo",
)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(run: Run, command: str) -> None:
    code, out, _ = run(command, "--help")
    assert code == 0
    assert command in out


def test_from_model_to_comparison(run: Run, model: Path, data: Path, tmp_path: Path) -> None:
    common = ("--data-dir", data)
    calibration = ("-t", "gsm8k", "-n", "6", *common)
    assert run("inspect", model, "--json")[0] == 0
    code, out, err = run("attribute", model, "-o", tmp_path / "effects", *calibration)
    assert code == 0, err
    assert "most critical units" in out
    effects = ("--effects", tmp_path / "effects" / "effects.json")
    code, out, err = run("prune", model, "-o", tmp_path / "cap", "--sparsity", "0.5", *effects, *common)
    assert code == 0, err
    assert "50.0000%" in out
    for source, name in ((model, "dense"), (tmp_path / "cap", "cap")):
        measured = ("--on", "gsm8k_nll", "--on", "strategyqa_nll:3")
        assert run("evaluate", source, *measured, "-o", tmp_path / f"{name}.json", *common)[0] == 0
    code, out, _ = run("compare", tmp_path / "dense.json", tmp_path / "cap.json", "--markdown")
    assert code == 0
    assert out.count("|") > 10
    assert run("verify", tmp_path / "cap")[0] == 0


@pytest.mark.filterwarnings("ignore:.*all that it holds")
def test_the_next_command_can_be_pasted(run: Run, model: Path, data: Path, tmp_path: Path) -> None:
    own = ("--data-dir", data, "-t", "strategyqa", "-n", "3")
    code, out, err = run("prune", model, "-o", tmp_path / "a model", "--method", "wanda", *own)
    assert code == 0, err
    assert "speed: runs at the dense model's speed" in out
    then = shlex.split(out.rpartition("next: causalprune ")[2])
    assert "strategyqa_nll:200" in then
    assert then[-2:] == ["--data-dir", str(data)], "data are read as before"
    assert run(*then)[0] == 0
    assert (tmp_path / "a model.json").exists()


@pytest.mark.thorough
def test_other_units_effects_and_estimators(run: Run, model: Path, data: Path, tmp_path: Path) -> None:
    common = ("-t", "gsm8k", "-n", "4", "--data-dir", data)
    ways = {
        "mlp": ("--units", "heads", "--units", "mlp", "--effect", "kl"),
        "gradient": ("--estimator", "gradient"),
        "budget": ("--budget", "1.4x"),
        "certain": ("--until-certain",),
        "mean": ("--ablation", "mean", "--cache-gib", "0"),
    }
    for name, options in ways.items():
        code, out, err = run("attribute", model, "-o", tmp_path / name, *common, *options)
        assert code == 0, err
        assert ("certain of their sign" in out) == (name != "mlp"), "divergences have no sign"
    effects = ("--effects", tmp_path / "budget" / "effects.json")
    code, _, err = run("prune", model, "-o", tmp_path / "cap", "--sparsity", "0.5", *effects)
    assert code == 0, err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--units", "haeds"), "did you mean 'heads'"),
        (("--units", "experts"), "no units of kind 'expert'"),
        (("--budget", "much"), "20x"),
        (("--budget", "100x"), "costs 1/"),
        (("--budget", "2x", "--estimator", "exact"), "belongs to the estimator 'adaptive'"),
    ],
)
def test_questions_that_make_no_sense(
    run: Run, model: Path, data: Path, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    common = ("-t", "gsm8k", "-n", "4", "--data-dir", data)
    assert_refused(
        run("attribute", model, "-o", tmp_path / "out", *common, *options), message, tmp_path / "out"
    )


def test_effects_without_heads_cannot_drive_cap(run: Run, model: Path, data: Path, tmp_path: Path) -> None:
    common = ("-t", "gsm8k", "-n", "4", "--data-dir", data)
    assert run("attribute", model, "-o", tmp_path / "mlp", *common, "--units", "mlp")[0] == 0
    effects = ("--effects", tmp_path / "mlp" / "effects.json")
    assert_refused(run("prune", model, "-o", tmp_path / "out", *effects), "--units heads", tmp_path / "out")


@pytest.mark.thorough
def test_stability_prints_its_tables(run: Run, model: Path, data: Path, tmp_path: Path) -> None:
    sources = ("-t", "gsm8k", "-t", "strategyqa", "-n", "1", "--top", "3", "--data-dir", data)
    code, out, err = run("stability", model, "-o", tmp_path / "stability", *sources)
    assert code == 0, err
    assert "independent draws" in out
    assert "joint effect" in out
    assert read_json(tmp_path / "stability" / "stability.json")["interactions"]["pairs"] == 3


@pytest.mark.thorough
def test_run_prints_the_table_and_keeps_results(run: Run, model: Path, data: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "own.yaml"
    recipe.write_text(yaml.safe_dump(recipe_for(model)))
    code, out, err = run("run", recipe, "-o", tmp_path / "run", "--data-dir", data, "--dry-run")
    assert code == 0, err
    assert "attribution" in out
    assert not (tmp_path / "run").exists()
    code, out, err = run("run", recipe, "-o", tmp_path / "run", "--data-dir", data)
    assert code == 0, err
    assert "verdict: cap-global-0.2" in out
    assert f"saved: {tmp_path / 'run' / 'checkpoints' / 'cap-global-0.2'}" in out
    assert "next: causalprune evaluate" in out or "next: causalprune sweep" in out
    assert len(read_json(tmp_path / "run" / "results.json")["rows"]) == 2
    assert "report.html" in "".join(out.split())
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert f"causalprune run {recipe} -o" in page


@pytest.mark.thorough
def test_paper_recipes_can_be_planned_without_the_model(run: Run, data_dir: Path, tmp_path: Path) -> None:
    for name in ("llama3-8b-paper", "mistral-7b-paper"):
        code, out, err = run("run", name, "-o", tmp_path / "run", "--dry-run", "--data-dir", data_dir)
        assert code == 0, err
        assert "32 layers × 32 heads" in " ".join(out.split())


def test_verify_fails_where_zeros_were_lost(run: Run, model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    assert run("prune", model, "-o", tmp_path / "out", "--method", "magnitude", "--sparsity", "0.5")[0] == 0
    tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tuned.model.layers[1].mlp.up_proj.weight.data += 1
    tuned.save_pretrained(tmp_path / "out")
    code, out, _ = run("verify", tmp_path / "out")
    assert code == 1
    assert "layers.1.up lost its zeros" in out


def recipe_for(model: Path, /, **changes: Any) -> dict[str, Any]:
    return {
        "model": {"name": str(model)},
        "calibration": {"task": ["gsm8k"], "n": 6},
        "methods": ["cap"],
        "sparsities": [0.2],
        "on": ["gsm8k_nll:3"],
        "general_text": "none",
        **changes,
    }


def foreign(folder: Path, kind: str) -> Path:
    """Save a model that is not a decoder with attention heads."""
    small: dict[str, Any] = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1}
    built: dict[str, Callable[[], Any]] = {
        "bert": lambda: BertForMaskedLM(BertConfig(**small, num_attention_heads=2, intermediate_size=8)),
        "t5": lambda: T5ForConditionalGeneration(
            T5Config(vocab_size=20, d_model=8, d_ff=8, num_layers=1, num_heads=2)
        ),
        "rwkv": lambda: RwkvForCausalLM(
            RwkvConfig(**(small | {"num_hidden_layers": 2}), attention_hidden_size=8, context_length=8)
        ),
    }
    built[kind]().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["bert", "t5", "rwkv"])
def test_models_that_are_not_decoders(run: Run, tmp_path: Path, kind: str) -> None:
    assert_refused(
        run("prune", foreign(tmp_path / kind, kind), "-o", tmp_path / "out"), kind, tmp_path / "out"
    )


def test_unknown_models(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert_refused(run("prune", "nobody/nothing", "-o", out), "nobody/nothing", out)
    (tmp_path / "empty").mkdir()
    assert_refused(run("prune", tmp_path / "empty", "-o", out), "config.json", out)


@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_damaged_weights(run: Run, tmp_path: Path, damage: str) -> None:
    folder, out = tmp_path / "model", tmp_path / "out"
    FAMILIES["llama3"]().save_pretrained(folder)
    weights = folder / "model.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    else:
        weights.unlink()
    assert_refused(run("prune", folder, "-o", out, "--method", "magnitude"), str(folder), out)


@pytest.mark.parametrize("sparsity", ["0", "1", "-0.1", "20 %", "nan", "1.5"])
def test_impossible_sparsities(run: Run, model: Path, tmp_path: Path, sparsity: str) -> None:
    assert_refused(
        run("prune", model, "-o", tmp_path / "out", f"--sparsity={sparsity}"), "sparsity", tmp_path / "out"
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--method", "wnda"), "did you mean 'wanda'"),
        (("--method", "cap:rows"), "did you mean 'row'"),
        (("--method", "wanda", "--effects", "nowhere.json"), "--effects are for cap"),
        (("--task", "gsm8"), "did you mean 'gsm8k'"),
        (("--chat", "maybe"), "chat"),
        (("--dtype", "float23"), "did you mean 'float32'"),
        (("--device", "abacus"), "abacus"),
        (("--method", "cap", "-n", "2"), "subsets"),
        (("--max-tokens", "2"), "usable"),
        (("--effects", "nowhere.json"), "nowhere.json"),
        (("-n", "none"), "-n"),
        (("--no-such-option",), "no-such-option"),
    ],
)
def test_bad_options(
    run: Run, model: Path, data: Path, tmp_path: Path, options: tuple[str, ...], words: str
) -> None:
    out = tmp_path / "out"
    assert_refused(run("prune", model, "-o", out, "--data-dir", data, *options), words, out)


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ('{"prompt": "a", "target": "b"}\n{"prompt": \n', ":2"),
        ('{"prompt": "a"}\n', ":1"),
        ('{"prompt": "a", "target": " "}\n', ":1"),
        ("", "empty"),
    ],
)
def test_bad_problems_name_the_line(run: Run, model: Path, tmp_path: Path, lines: str, words: str) -> None:
    own, out = tmp_path / "own.jsonl", tmp_path / "out"
    own.write_text(lines)
    assert_refused(
        run("prune", model, "-o", out, "-t", own, "-n", "3"),
        f"own.jsonl{words}" if words[0] == ":" else words,
        out,
    )


def test_no_network_and_no_data_folder(
    run: Run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    assert_refused(run("prune", model, "-o", tmp_path / "out", "-n", "3"), "--data-dir", tmp_path / "out")


def test_output_folder_exists(run: Run, model: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("keep me")
    code, _, err = run("prune", model, "-o", out, "--data-dir", data, "--method", "magnitude")
    assert code == 2
    assert "exists: choose another folder, or pass --overwrite" in err
    assert run("prune", model, "-o", out, "--method", "magnitude", "--overwrite")[0] == 2
    assert (out / "mine.txt").read_text() == "keep me"


def test_effects_of_another_model(run: Run, model: Path, data: Path, tmp_path: Path) -> None:
    own = write_jsonl(tmp_path / "own.jsonl", [{"prompt": f"{i}", "target": f"{i}"} for i in range(4)])
    assert run("attribute", model, "-o", tmp_path / "effects", "-t", own, "-n", "3")[0] == 0
    other = tmp_path / "other"
    changed = tiny_decoder()
    changed.model.model.layers[0].mlp.up_proj.weight.data += 1
    changed.model.save_pretrained(other)
    changed.tokenizer.save_pretrained(other)
    effects = ("--effects", tmp_path / "effects" / "effects.json")
    assert_refused(
        run("prune", other, "-o", tmp_path / "out", *effects, "--data-dir", data),
        "another model",
        tmp_path / "out",
    )


@pytest.mark.parametrize(
    "case",
    [
        ({"methodes": []}, "did you mean 'methods'"),
        ({"on": ["gsm8k_nl"]}, "did you mean 'gsm8k_nll'"),
        ({"model": {"name": "embedded", "dtype": "fp16"}}, "fp16"),
        ({"model": {"name": "embedded", "device": "abacus"}}, "abacus"),
    ],
)
@pytest.mark.parametrize("mode", [("--dry-run",), ()])
def test_bad_recipes(
    run: Run, model: Path, data: Path, tmp_path: Path, case: tuple[dict[str, Any], str], mode: tuple[str, ...]
) -> None:
    change, words = case
    path, out = tmp_path / "recipe.yaml", tmp_path / "out"
    path.write_text(yaml.safe_dump(recipe_for(model, **change)))
    assert_refused(run("run", path, "-o", out, "--data-dir", data, *mode), words, out)


@pytest.mark.thorough
def test_more_examples_than_there_are_is_a_line_in_plan_and_run(
    run: Run, model: Path, data: Path, tmp_path: Path
) -> None:
    own = {"calibration": {"task": ["gsm8k"], "n": 5000}, "methods": ["wanda"], "on": ["gsm8k_nll:3"]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe_for(model, **own)))
    for mode in (("--dry-run",), ()):
        with pytest.warns(
            UserWarning, match="gsm8k: 5000 examples asked for, 12 taken: all that it holds"
        ) as said:
            assert (
                run("run", tmp_path / "recipe.yaml", "-o", tmp_path / "out", "--data-dir", data, *mode)[0]
                == 0
            )
        assert len(said) == 1
    assert read_json(tmp_path / "out" / "results.json")["calibration"]["sources"] == {"gsm8k": 12}


def test_results_on_other_examples_are_not_compared(
    run: Run, model: Path, data: Path, tmp_path: Path
) -> None:
    for name, limit in (("a", 2), ("b", 3)):
        options = ("--on", f"gsm8k_nll:{limit}", "-o", tmp_path / f"{name}.json", "--data-dir", data)
        assert run("evaluate", model, *options)[0] == 0
    code, _, err = run("compare", tmp_path / "a.json", tmp_path / "b.json")
    assert code == 2
    assert "different examples" in err
    code, _, err = run("compare", tmp_path / "a.json", "--against", "c")
    assert code == 2
    assert "unknown row 'c'" in err
    before = (tmp_path / "a.json").read_bytes()
    for command in (
        ("evaluate", model, "--on", "gsm8k_nll:2", "--data-dir", data),
        ("merge", tmp_path / "b.json"),
    ):
        code, _, err = run(*command, "-o", tmp_path / "a.json")
        assert code == 2
        assert "a.json exists: choose another name, or pass --overwrite" in err
    assert (tmp_path / "a.json").read_bytes() == before


def test_ctrl_c_says_how_to_go_on(
    run: Run, model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("causalprune.runs.single.measure", stop)
    code, _, err = run("attribute", model, "-o", tmp_path / "effects", "-n", "3", "--data-dir", data)
    assert code == 130
    assert "goes on" in err


def test_debug_shows_where(model: Path, tmp_path: Path) -> None:
    from causalprune.core.errors import OptionError

    with pytest.raises(OptionError):
        main(["--debug", "prune", str(model), "-o", str(tmp_path / "out"), "--sparsity", "2"])


def test_json_of_inspect_is_json(run: Run, model: Path) -> None:
    code, out, _ = run("inspect", model, "--json")
    assert code == 0
    assert json.loads(out)["heads"] == 4
