"""The command that makes smaller models."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import typer

from causalprune.cli import options as opt
from causalprune.cli.groups import grouped
from causalprune.cli.options import app
from causalprune.cli.output import AsJson, document, pushed_to, say
from causalprune.core import OptionError

if TYPE_CHECKING:
    from causalprune.core import Calibration, Decoder
    from causalprune.runs import ModelSpec, Options
    from causalprune.shrinking import Budget, Shares


@dataclass(frozen=True)
class RemovalOptions:
    """Which units go for good, and how many."""

    panel: ClassVar[str] = "Method"

    parameters: Annotated[
        float | None,
        typer.Option(
            "--parameters",
            help="Share of all parameters that goes; neurons, KV groups, experts and layers compete for it.",
        ),
    ] = None
    memory: Annotated[
        str | None,
        typer.Option("--memory", help="The weights take at most so many bytes: 200MB (10⁶ bytes), 1.5GB."),
    ] = None
    latency: Annotated[
        float | None,
        typer.Option(
            "--latency",
            help="A written token takes at most this share of the whole model's time, on this machine in transformers: 0.8.",
        ),
    ] = None
    neurons: Annotated[
        float, typer.Option("--neurons", help="Share of the MLP neurons of every layer that goes.")
    ] = 0.0
    kv_groups: Annotated[
        float,
        typer.Option(
            "--kv-groups", help="Share of the KV heads of every layer that goes, with their query heads."
        ),
    ] = 0.0
    experts: Annotated[
        float, typer.Option("--experts", help="Share of the experts of every layer that goes.")
    ] = 0.0
    layers: Annotated[float, typer.Option("--layers", help="Share of the layers that goes.")] = 0.0
    as_mistral: Annotated[
        bool,
        typer.Option(
            "--as-mistral",
            help="Take a Llama as a Mistral without a window, which computes the same: its heads need not divide its width, so that "
            "KV groups can go one by one.",
        ),
    ] = False
    by: Annotated[
        Literal["effect", "activation", "magnitude", "random"],
        typer.Option(
            help="What units are worth: effect (on the task), activation (for experts as REAP ranks them; not for layers), "
            "magnitude or random."
        ),
    ] = "effect"
    update: Annotated[
        Literal["none", "obs", "refit", "distill", "adam"],
        typer.Option(help="Makes up for what goes: distill (refit, then training), refit, obs, or none."),
    ] = "distill"

    def wanted(self) -> "Shares | Budget":
        """Return the shares that go, or the budget that kinds of units compete for."""
        from causalprune.shipping import bytes_of
        from causalprune.shrinking import Budget, Shares

        own = (self.neurons, self.kv_groups, self.experts, self.layers)
        budgets = {"--parameters": self.parameters, "--memory": self.memory, "--latency": self.latency}
        named = [name for name, value in budgets.items() if value is not None]
        if not named:
            return Shares(*own)
        if any(own) or len(named) > 1:
            raise OptionError(
                f"{named[0]} chooses every kind's share itself: leave the other shares out, and other budgets"
            )
        return Budget(self.parameters, None if self.memory is None else bytes_of(self.memory), self.latency)

    def taken(self, decoder: "Decoder") -> "Decoder":
        """Return a model as the class that it is to be."""
        from causalprune.models import as_mistral

        return as_mistral(decoder) if self.as_mistral else decoder


def _opened(
    spec: "ModelSpec", data: opt.MixedOptions | None, options: "Options", output: Path, kept_in: Path
) -> tuple["Decoder", "Calibration"]:
    """Load the model that is to be smaller, and its examples, if any, where there is room for what comes of it."""
    from causalprune.checkpoints import check_room, warn_unpacked
    from causalprune.pruning import begun
    from causalprune.runs import prepared, room_of

    def check(decoder: "Decoder") -> None:
        warn_unpacked(decoder)
        check_room(output, room_of(decoder, kept_in))

    wanted = None if data is None else data.spec(1).settled(own=True)
    return prepared(spec, wanted, options, begun(kept_in), check)


@app.command()
@grouped
def shrink(
    *,
    model: opt.ModelOptions,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the smaller checkpoint.")],
    data: opt.MixedOptions = opt.MixedOptions(n=48),
    method: RemovalOptions,
    running: opt.RunningOptions,
    time: Annotated[
        bool,
        typer.Option("--time/--no-time", help="Time the model beside the whole one, for at most 20 seconds."),
    ] = True,
    hub: opt.HubOptions,
    overwrite: opt.Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Remove units for good: a smaller and faster model in the standard form of its architecture, chosen by effect on the task."""
    from causalprune.checkpoints import check_destination, save
    from causalprune.cli import tables
    from causalprune.core import forget, size_of
    from causalprune.runs import check_trained, outcome, reading, speeds
    from causalprune.shrinking import Shrinking, leftovers, looks
    from causalprune.shrinking import shrink as smaller

    goes, spec = method.wanted(), model.spec()
    check_destination(output, overwrite)
    check_trained(spec, method.update)
    repository = hub.reserve(output, overwrite)
    options, ledger = running.options(data.reading.data_dir), output.with_name(f"{output.name}.attribution")
    how = Shrinking(method.by, method.update, data.reading.seed, options.batch_tokens)
    seen = data if looks(goes, how) else None
    decoder, calibration = _opened(spec, seen, options, output, leftovers(ledger)["update"])
    decoder = method.taken(decoder)
    shrunk = smaller(decoder, goes, calibration, how, ledger=ledger, stage=options.stage)
    speed = None
    if time:
        with options.stage("timing"):
            speed = speeds(decoder, shrunk.decoder)
    sizes = {"before": asdict(size_of(decoder)), "after": asdict(size_of(shrunk.decoder))}
    told = shrunk.options | {"speed": speed and asdict(speed), "size": sizes}
    with options.stage("saving"):
        save(shrunk.decoder, output, replace(shrunk, options=told), overwrite=overwrite)
    for path in leftovers(ledger).values():
        forget(path)
    if shrunk.unrouted:
        said = "experts, put before others, got no token that tells their worth"
        say(tables.unrouted(shrunk.unrouted, said))
    made = outcome(output, reading(vars(data.spec(1)), vars(spec), data.reading.data_dir))
    say(tables.outcome(made))
    pushed = pushed_to(output, repository)
    document(as_json, saved=output, **vars(made), unrouted=shrunk.unrouted, pushed=pushed)
