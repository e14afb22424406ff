"""Evaluate runs with EleutherAI's lm-evaluation-harness (the extra ``lm-eval``), as its model ``rim``.

Importing this module registers the model, also for ``lm_eval.simple_evaluate(model="rim", model_args=...)``.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from rim_peft.data.examples import Templates
from rim_peft.data.sources import asking_hub
from rim_peft.data.tokenization import Encoder
from rim_peft.evaluation.harness import BlockLM  # first: it says what to install if the harness is missing
from rim_peft.methods import get_method
from rim_peft.run.loading import Run, load_run

# isort: split
from lm_eval.api.registry import register_model
from lm_eval.evaluator import simple_evaluate
from lm_eval.loggers import EvaluationTracker
from lm_eval.tasks import TaskManager
from lm_eval.utils import make_table

__all__ = ["RimLM", "make_table", "run_harness"]


@register_model("rim")
class RimLM(BlockLM):
    """A run, or an adapter's folder or Hub id, as the harness's model ``rim``.

    ``HFLM``'s loading options have no effect: the run determines how its base is loaded.
    """

    def __init__(
        self,
        pretrained: str,
        *,
        num_blocks: int | None = None,
        base: str | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        device: str | None = None,
        **options: Any,
    ) -> None:
        """Load a run.

        Args:
            pretrained: output folder of a training, or an adapter's folder or Hub id.
            num_blocks: blocks after each context; the adapter's own if not given.
            base, revision, trust_remote_code: as in :func:`~rim_peft.run.load_run`.
            device: where to put the model; by default the GPU, if there is one. A quantised base stays where it was
                loaded.
            options: options of ``HFLM``, such as ``batch_size`` and ``max_length``.

        Raises:
            FileNotFoundError: there is no adapter.
            ValueError: it is of another kind or an export, its method does not answer after blocks or at once, or
                there are several processes.
        """
        if (num_processes := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
            raise ValueError(
                f"processes: must be one, which evaluates everything, got {num_processes}. Start it without accelerate "
                "launch or torchrun, and distribute the tasks by hand."
            )
        run = load_run(pretrained, base=base, revision=revision, trust_remote_code=trust_remote_code)
        if run.exported is not None:
            raise ValueError(
                f"{pretrained}: must be an adapter, got an export, whose tokenizer puts blocks after whole texts. "
                "Give the adapter that it was made from."
            )
        _check_method(run, num_blocks)
        _move(run, device)
        options.setdefault("allow_special_tokens", run.templates.allow_special_tokens or _spells_tokens(run))
        variables = {**run.templates.chat_template_kwargs, **(options.pop("chat_template_args", None) or {})}
        super().__init__(run.model, run.tokenizer, num_blocks=num_blocks, chat_template_args=variables, **options)
        self.source = pretrained

    def get_model_info(self) -> dict[str, Any]:
        """Return the harness's description of the model, with adapter and blocks."""
        return {**super().get_model_info(), "rim_adapter": self.source, "rim_num_blocks": self.num_blocks}


def run_harness(
    source: str,
    tasks: Sequence[str],
    *,
    num_blocks: int | None = None,
    base: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    include_path: str | None = None,
    output_path: str | None = None,
    log_samples: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Run tasks of the harness on a run, and return the harness's results.

    Args:
        source: output folder of a training, or an adapter's folder or Hub id.
        tasks: names of tasks, groups or tags, or files of tasks.
        num_blocks: blocks after each context; the adapter's own if not given.
        base, revision, trust_remote_code: as in :func:`~rim_peft.run.load_run`.
        include_path: folder with task files in addition to the harness's own; task files can run code.
        output_path: folder or ``.json`` file for the results.
        log_samples: keep every request and answer among the results, and write them to ``output_path``.
        options: options of ``lm_eval.simple_evaluate``, such as ``limit``, ``num_fewshot`` and ``batch_size``.

    Raises:
        FileNotFoundError: there is no adapter.
        ValueError: there is no such task, or ``log_samples`` has no ``output_path``.
    """
    if log_samples and output_path is None:
        raise ValueError("log_samples: needs a folder for the samples. Give output_path (--output_path).")
    manager = _find_tasks(tasks, include_path)
    model_args: dict[str, Any] = {"pretrained": source, "num_blocks": num_blocks, "base": base, "revision": revision}
    model_args["trust_remote_code"] = trust_remote_code or None
    tracker = EvaluationTracker(output_path=output_path)
    with asking_hub("") as problem:
        try:
            results: dict[str, Any] = simple_evaluate(
                model="rim",
                model_args={name: value for name, value in model_args.items() if value is not None},
                tasks=list(tasks),
                task_manager=manager,
                log_samples=log_samples,
                evaluation_tracker=tracker,
                **options,
            )
        except (ConnectionError, FileNotFoundError) as error:
            if problem is None or str(error).startswith(source):
                raise
            raise ConnectionError(f"tasks: the rows of {', '.join(tasks)} are not here, and {problem}.") from error
    if output_path is not None:
        samples = results.get("samples") or {}
        tracker.save_results_aggregated(
            results={name: value for name, value in results.items() if name != "samples"}, samples=samples
        )
        for task, rows in samples.items():
            tracker.save_results_samples(task_name=task, samples=rows)
    return results


def _find_tasks(tasks: Sequence[str], include_path: str | None) -> TaskManager:
    """Return a manager that knows the given tasks; loads the harness's thousands only if needed."""
    if include_path is not None and not Path(include_path).is_dir():
        raise ValueError(f"include_path: must be a folder with files of tasks, got {include_path!r}.")
    for include_defaults in (False, True):
        manager = TaskManager(include_path=include_path, include_defaults=include_defaults)
        unknown = [task for task in tasks if task not in manager.all_tasks and not Path(task).is_file()]
        if not unknown:
            return manager
    raise ValueError(
        f"tasks: must be tasks of the harness or of include_path, or files of tasks, got {', '.join(unknown)}. "
        "lm-eval ls tasks lists the harness's."
    )


def _check_method(run: Run, num_blocks: int | None) -> None:
    """Refuse methods with their own way of answering, and blocks for methods without."""
    if run.recipe is None:
        return
    method = run.recipe.method
    if not get_method(method).is_plain:
        raise ValueError(
            f"method: must answer after blocks or at once, got {method!r}, whose continuous thoughts the harness "
            "cannot score. Use rim-peft evaluate."
        )
    if num_blocks and not run.recipe.rim_config().num_blocks:
        raise ValueError(f"num_blocks: must not be given for method {method!r}, which has no blocks. Omit it.")


def _spells_tokens(run: Run) -> bool:
    """Tell whether the training's templates spell out special tokens; a task that follows them spells them out too."""
    encoder = Encoder(run.tokenizer, Templates())
    return any(encoder.spells_tokens(text) for text in (run.templates.prompt, run.templates.answer))


def _move(run: Run, device: str | None) -> None:
    """Move an unquantised model to ``device`` if that exists; the harness asks for a GPU by default."""
    is_there = device is not None and (device == "cpu" or torch.cuda.is_available())
    if is_there and (run.recipe is None or run.recipe.model.quantization is None):
        run.model.to(device)
