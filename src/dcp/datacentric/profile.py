"""The profile: what micro-batches of every bucket, degree and batch size cost.

Few layers are measured and the rest extrapolated. A profile belongs to one machine and model.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dcp.datacentric.recompute import LayerKind, keep_activations

FORMAT = "dcp data-centric profile 1"


@dataclass(frozen=True)
class LayerCost:
    """One layer of a kind: seconds of its passes, bytes of its inputs and kept activations."""

    forward_seconds: float
    backward_seconds: float
    input_bytes: int
    activation_bytes: int


@dataclass(frozen=True)
class Measurement:
    """A micro-batch through a shallow model, every layer recomputed in the backward pass.

    Attributes:
        seconds: forward, recomputation and backward.
        peak_bytes: activations at their peak; weights, gradients and optimiser state left out.
        layers: by kind.
    """

    seconds: float
    peak_bytes: int
    layers: dict[str, LayerCost]


@dataclass(frozen=True)
class Cost:
    """A micro-batch through the whole model, as a plan may choose it.

    ``keep``: layers of each kind that keep their activations.
    """

    seconds: float
    num_bytes: int
    keep: dict[str, int]


Key = tuple[str, int, int]  # bucket, degree, batch size


@dataclass
class Profile:
    """Measurements and the model they are extrapolated to.

    Attributes:
        machine, model: what was measured, compared when the profile is loaded.
        depth: layers of each kind of the whole model.
        measured_depth: layers of each kind that were run.
        memory_bytes: what a rank may use.
        static_bytes: weights, gradients and optimiser state of the whole model.
        sync_seconds: adding up gradients over all ranks, and the optimiser's step.
        found: by (bucket, degree, batch size); None where it ran out of memory.
    """

    machine: dict[str, Any]
    model: dict[str, Any]
    depth: dict[str, int]
    measured_depth: dict[str, int]
    memory_bytes: int
    static_bytes: int
    sync_seconds: float = 0.0
    found: dict[Key, Measurement | None] = field(default_factory=dict)

    def cost(self, key: Key, *, recompute: bool = True) -> Cost | None:
        """The whole model's cost; None where it does not fit.

        With ``recompute`` every layer recomputes, without it as many layers as memory has room for
        keep their activations.
        """
        measured = self.found.get(key)
        if measured is None:
            return None
        seconds, num_bytes = self.extrapolate(measured)
        if num_bytes > self.memory_bytes:
            return None
        keep = dict.fromkeys(measured.layers, 0)
        if not recompute:
            kinds = self._kinds(measured)
            keep = keep_activations(kinds, self.memory_bytes - num_bytes)
            seconds -= sum(keep[kind.name] * kind.forward_seconds for kind in kinds)
            num_bytes += sum(keep[kind.name] * kind.activation_bytes for kind in kinds)
        return Cost(seconds, num_bytes, keep)

    def extrapolate(self, measured: Measurement) -> tuple[float, int]:
        """Seconds and bytes of the whole model with every layer recomputed."""
        seconds, num_bytes = measured.seconds, self.static_bytes + measured.peak_bytes
        for kind, layer in measured.layers.items():
            more = self.depth[kind] - self.measured_depth[kind]
            seconds += more * (2 * layer.forward_seconds + layer.backward_seconds)
            num_bytes += more * layer.input_bytes
        return seconds, num_bytes

    @property
    def file_name(self) -> str:
        """Of its machine and model alone: runs of one shape share it in a folder of profiles."""
        shape = json.dumps([self.machine, self.model, self.depth], sort_keys=True)
        return f"profile-{hashlib.sha256(shape.encode()).hexdigest()[:16]}.json"

    def _kinds(self, measured: Measurement) -> list[LayerKind]:
        return [
            LayerKind(name, self.depth[name], max(cost.forward_seconds, 0.0), cost.activation_bytes)
            for name, cost in measured.layers.items()
        ]

    # ------------------------------------------------------------------ on disk

    def save(self, path: str | Path) -> None:
        """Write JSON, and the measurements as CSV beside it; a file appears whole or not at all."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(path.name + ".partial")
        draft.write_text(json.dumps(self.to_json(), indent=1) + "\n")
        os.replace(draft, path)
        self._save_csv(path.with_suffix(".csv"))

    def to_json(self) -> dict[str, Any]:
        rows = [
            [*key, None if measured is None else asdict(measured)]
            for key, measured in self.found.items()
        ]
        return {"format": FORMAT, **vars(self), "found": rows}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Profile:
        """The profile that :meth:`to_json` gave; anything else raises one of several errors."""
        if content.get("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT!r}")
        fields = {name: value for name, value in content.items() if name != "format"}
        profile = cls(**{**fields, "found": {}})
        for bucket, degree, batch_size, row in content["found"]:
            key = (str(bucket), int(degree), int(batch_size))
            profile.found[key] = None if row is None else _measurement(row, list(profile.depth))
        return profile

    def _save_csv(self, path: Path) -> None:
        kinds = list(self.depth)
        parts = list(LayerCost.__dataclass_fields__)
        columns = ["bucket", "degree", "batch_size", "seconds", "peak_bytes"]
        columns += [f"{kind}_{part}" for kind in kinds for part in parts]
        draft = path.with_name(path.name + ".partial")
        with draft.open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow([*columns, "predicted_seconds", "predicted_bytes"])
            for key, measured in self.found.items():
                if measured is None:
                    table.writerow([*key, "out of memory"])
                    continue
                layers = [measured.layers[kind] for kind in kinds]
                costs = [getattr(layer, part) for layer in layers for part in parts]
                row = [*key, measured.seconds, measured.peak_bytes, *costs]
                table.writerow([*row, *self.extrapolate(measured)])
        os.replace(draft, path)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        machine: Mapping[str, Any] | None = None,
        model: Mapping[str, Any] | None = None,
    ) -> Profile:
        """Read a profile; ``machine`` and ``model``, where given, must be the profile's own.

        Raises ``ValueError`` for a damaged file, or a profile of another machine or model.
        """
        try:
            profile = cls.from_json(json.loads(Path(path).read_text()))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{path} is not a profile: {error}; measure it anew") from None
        for name, wanted in (("machine", machine), ("model", model)):
            if wanted is not None:
                _compare(path, name, getattr(profile, name), dict(wanted))
        return profile


def _measurement(row: dict[str, Any], kinds: Sequence[str]) -> Measurement:
    layers = {kind: LayerCost(**row["layers"][kind]) for kind in kinds}
    measured = Measurement(row["seconds"], row["peak_bytes"], layers)
    numbers = [measured.seconds, measured.peak_bytes]
    numbers += [number for layer in layers.values() for number in vars(layer).values()]
    if not all(isinstance(number, int | float) and number >= 0 for number in numbers):
        raise ValueError(f"a measurement is not made of numbers of 0 or more: {row}")
    return measured


def _compare(path: str | Path, name: str, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    wanted = json.loads(json.dumps(wanted))  # as a file would have it
    for key in sorted(found.keys() | wanted.keys()):
        if found.get(key) != wanted.get(key):
            raise ValueError(
                f"{path} is the profile of another {name}: {key} is {found.get(key)!r} there, "
                f"{wanted.get(key)!r} here; give another profile_path"
            )
