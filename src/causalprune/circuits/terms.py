"""What may be asked of a search, and what follows where it is not said."""

from dataclasses import replace

from causalprune.attribution import Ablation, Estimator, Question, check_together
from causalprune.circuits.behaviour import MEASURED
from causalprune.circuits.ranking import FEWEST, RANKS, Rank
from causalprune.core import Calibration, DataError, Effect, OptionError, unknown
from causalprune.interventions import grouped_by_effect

EPOCHS = 10
"""How often gates are learned from all problems."""


def check_problems(score: Calibration, decide: Calibration, *, halved: bool) -> None:
    """Raise a `CausalPruneError` for problems without targets, too few to resample, or compared with a wrong answer on one side alone."""
    for own in (score, decide):
        if empty := [example for example in own.examples if not example.target_tokens]:
            raise DataError(
                f"{empty[0].source}: an example has no target tokens, so there is nothing to lose: mark some"
            )
        if not own.examples:  # of halves, in each of which prompts stay together
            raise DataError(
                "all problems have one prompt: give others to decide on (--on; in Python `decide`)"
            )
    check_enough(len(score.examples), len(decide.examples), halved=halved)
    compared = [any(example.instead is not None for example in own.examples) for own in (score, decide)]
    if compared[0] != compared[1]:
        some, others = ("score on (--task)", "decide on (--on)")[:: 1 if compared[0] else -1]
        raise OptionError(
            f"problems to {some} have a wrong answer to compare with, and those to {others} have none: give it to all or to none"
        )


def check_enough(score: int, decide: int, *, halved: bool) -> None:
    """Raise `DataError` for so many problems on either side, or halves of one set, which are too few to resample."""
    if halved and min(score, decide) < FEWEST:
        raise DataError(
            f"of {score + decide} problems (--task) {score} are to score on and {decide} to decide on, too few to resample: take at "
            f"least {2 * FEWEST}, or others to decide on (--on; in Python `decide`)"
        )
    for what, n in (("score on (--task)", score), ("decide on (--on)", decide)):
        if n < FEWEST:
            raise DataError(f"{n} problems to {what} are too few to resample: take at least {FEWEST}")


def effect_for(rank: Rank, estimator: Estimator, ablation: Ablation = "zero") -> Effect:
    """Return the effect where none is named: `ce` for `signed`, for relevance and with counterfactuals, else `kl`."""
    by_loss = rank == "signed" or estimator.name == "relevance" or ablation == "counterfactual"
    return "ce" if by_loss else "kl"


def turns(
    question: Question, estimator: Estimator, rescore: int | None = None, rank: Rank = "absolute"
) -> tuple[Estimator, int]:
    """Return the estimator with its epochs, and rounds of scores, where either is not named.

    10 epochs and 1 round by `kl`, and with counterfactuals in a circuit of either sign, but for relevance; else none and 3.
    """
    measured, learn = estimator.name in MEASURED, estimator.epochs
    if learn is None:
        paired = (question.ablation, rank) == ("counterfactual", "absolute") and estimator.name != "relevance"
        follows = (question.effect == "kl" or paired) and not measured
        learn = EPOCHS if follows and rescore is None else 0
    rounds = rescore if rescore is not None else 1 if learn or measured else 3
    return replace(estimator, epochs=learn), rounds


def check_search(question: Question, estimator: Estimator, keep: float, rank: Rank, rescore: int) -> None:
    """Raise `OptionError` for what does not go together, before anything is loaded."""
    learn = estimator.epochs or 0
    check_together(question, estimator)
    if learn < 0:
        raise OptionError(f"gates are learned in at least 0 epochs, not {learn}")
    if grouped_by_effect(question.units):
        raise OptionError(
            "groups of neurons by effect are others on every set of problems: for circuits take neurons:1, or neurons:64 in a row"
        )
    if rank == "signed" and question.effect == "kl":
        raise OptionError(
            "a divergence has no sign: for the rank 'signed' (--rank) ask for the effect 'ce' (--effect ce)"
        )
    if learn and rank == "signed":
        raise OptionError(
            "a learned order keeps what the intact model does, helpful or harmful: ask for no epochs with --rank signed (--learn 0)"
        )
    if not 0 < keep <= 1:
        raise OptionError(f"the share to keep must be above 0 and at most 1, not {keep:g}")
    if rank not in RANKS:
        raise unknown("rank", rank, RANKS)
    if rescore < 1:
        raise OptionError(f"units are scored in at least 1 round, not {rescore}")
    if rescore > 1 and estimator.name in MEASURED:
        raise OptionError(
            f"the estimator {estimator.name!r} scores the intact model alone: ask for 1 round (--rescore 1)"
        )
