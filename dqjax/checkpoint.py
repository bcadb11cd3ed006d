"""Checkpoints that are proved whole before they count.

    RUN/checkpoints/step_00000200/
        params/ opt_state/ key/ ...     the items, written by orbax in the background
        meta/                           JSON: data state, counters, versions
        manifest-0-of-1.json            size and SHA-256 of every file, written last, by rename

Orbax commits a step by rename, so a kill in mid-save leaves none; but it restores a file with a flipped bit without a word.
Hence the manifest: a step without a complete one does not exist for `restore`, and every file is checked against it before
it is read. Each host hashes its share of the files.
"""

import hashlib
import json
import logging
import pathlib
import shutil
import threading
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

log = logging.getLogger(__name__)

PREFIX = "step_"


class DamagedCheckpoint(ValueError):
    """A checkpoint whose files are not those that were written; the message names the file."""


class Checkpoints:
    """The checkpoints of one run, newest last.

    Args:
      folder: on a disk that all hosts share.
      keep: how many of the newest to keep; the best one (lowest `score`) is kept besides. Others are deleted, but only
        after a newer one is proved.
    """

    def __init__(self, folder: str | pathlib.Path, *, keep: int = 2):
        self.folder = pathlib.Path(folder).resolve()  # orbax wants it absolute
        self.keep = keep
        self._orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
        self._worker: threading.Thread | None = None
        self._failure: BaseException | None = None

    def path(self, step: int) -> pathlib.Path:
        return self.folder / f"{PREFIX}{step:08d}"

    def steps(self) -> list[int]:
        """Steps with a complete manifest, ascending. Their files are not yet checked: see `verify`."""
        return [step for step in self._written() if self._manifests(step)]

    def best(self) -> int | None:
        """The proved step with the lowest score, if any was saved with one."""
        scored = [(s["score"], step) for step in self.steps() if (s := self._manifests(step)[0]).get("score") is not None]
        return min(scored)[1] if scored else None

    def save(self, step: int, items: Mapping[str, Any], meta: Mapping[str, Any], *, score: float | None = None) -> None:
        """Starts to write a step and returns once the arrays are copied off the device.

        Args:
          items: name → pytree of arrays.
          meta: JSON values.
          score: lower is better; keeps the best step from being deleted.

        Raises:
          whatever the *previous* save failed with.
        """
        self.wait()
        args = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        args["meta"] = ocp.args.JsonSave({**meta, "step": step, "items": sorted(items)})
        self._orbax.save(self.path(step), args=ocp.args.Composite(**args), force=True)
        self._worker = threading.Thread(target=self._prove, args=(step, score), name=f"prove-step-{step}")
        self._worker.start()

    def wait(self) -> None:
        """Blocks until the last save is proved; raises what it failed with."""
        if self._worker is not None:
            self._worker.join()
            self._worker = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def close(self) -> None:
        self.wait()
        self._orbax.close()

    def restore(self, items: Mapping[str, Any], *, step: int | None = None) -> tuple[int, dict[str, Any], dict[str, Any]] | None:
        """Reads the newest intact step (or `step`).

        Args:
          items: name → tree of ShapeDtypeStructs with shardings; only these items are read.

        Returns:
          (step, items, meta), or None where no step was ever proved.

        Raises:
          DamagedCheckpoint: `step` was asked for and is damaged, or all are.
          ValueError: `step` does not exist.
        """
        found = self.intact_step(step)
        if found is None:
            return None
        args = {name: ocp.args.StandardRestore(tree) for name, tree in items.items()}
        restored = self._orbax.restore(self.path(found), args=ocp.args.Composite(**args, meta=ocp.args.JsonRestore()))
        return found, {name: restored[name] for name in items}, restored["meta"]

    def intact_step(self, step: int | None = None) -> int | None:
        """The newest step whose files are all as written (or `step`, checked); damaged ones are warned about and skipped."""
        proved = self.steps()
        if step is not None:
            if step not in proved:
                raise ValueError(f"{self.folder} has no complete checkpoint of step {step}; it has {proved or 'none'}")
            self.verify(step)
            return step
        for unproved in [s for s in self._written() if s not in proved]:
            log.warning("%s has no manifest: it was not finished and is not used", self.path(unproved))
        damage: DamagedCheckpoint | None = None
        for candidate in reversed(proved):
            try:
                self.verify(candidate)
                return candidate
            except DamagedCheckpoint as e:
                log.warning("%s; going back to the checkpoint before it", e)
                damage = e
        if damage is not None:
            raise damage
        return None

    def verify(self, step: int) -> None:
        """Compares every file of a step with its manifest; raises `DamagedCheckpoint` naming the first that differs."""
        files = {name: entry for part in self._manifests(step) for name, entry in part["files"].items()}
        problem = ""
        for i, name in enumerate(sorted(files)):
            if i % jax.process_count() == jax.process_index() and not problem:
                problem = _differs(self.path(step) / name, files[name])
        if jax.process_count() > 1:
            bad = multihost_utils.process_allgather(np.asarray(bool(problem)))
            problem = problem or ("another host found a damaged file" if bad.any() else "")
        if problem:
            raise DamagedCheckpoint(f"checkpoint {self.path(step)} is damaged: {problem}")

    def _written(self) -> list[int]:
        if not self.folder.exists():
            return []
        names = [p.name for p in self.folder.iterdir()]
        return sorted(int(n.removeprefix(PREFIX)) for n in names if n.startswith(PREFIX) and n.removeprefix(PREFIX).isdigit())

    def _manifests(self, step: int) -> list[dict]:
        """The parts of a step's manifest, or [] unless all are there and readable."""
        paths = sorted(self.path(step).glob("manifest-*-of-*.json"))
        try:
            parts = [json.loads(p.read_text()) for p in paths]
        except (ValueError, OSError):
            return []
        return parts if parts and all(part["parts"] == len(parts) for part in parts) else []

    def _prove(self, step: int, score: float | None) -> None:
        try:
            self._orbax.wait_until_finished()
            index, count, folder = jax.process_index(), jax.process_count(), self.path(step)
            names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and "manifest-" not in p.name)
            mine = {name: _fingerprint(folder / name) for i, name in enumerate(names) if i % count == index}
            manifest = {"parts": count, "score": score, "files": mine}
            path = folder / f"manifest-{index}-of-{count}.json"
            temporary = folder / f".{path.name}.tmp"
            temporary.write_text(json.dumps(manifest, indent=1))
            temporary.rename(path)
            if index == 0:
                self._delete_old()
        except BaseException as e:  # noqa: BLE001 - handed to the training thread by the next wait()
            self._failure = e

    def _delete_old(self) -> None:
        proved = self.steps()
        spare = set(proved[-self.keep :]) | {self.best()}
        for step in proved:
            if step not in spare:
                for manifest in self.path(step).glob("manifest-*"):  # first, so that a half-deleted step does not count
                    manifest.unlink()
                shutil.rmtree(self.path(step))


def _fingerprint(path: pathlib.Path) -> dict[str, Any]:
    with path.open("rb") as f:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(f, "sha256").hexdigest()}


def _differs(path: pathlib.Path, expected: Mapping[str, Any]) -> str:
    """What is wrong with a file, or ""."""
    if not path.exists():
        return f"{path} is missing"
    if (size := path.stat().st_size) != expected["size"]:
        return f"{path} has {size} bytes, expected {expected['size']}"
    if _fingerprint(path)["sha256"] != expected["sha256"]:
        return f"{path} does not have the SHA-256 it was written with"
    return ""
