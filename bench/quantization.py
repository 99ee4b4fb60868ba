"""What each precision costs and gains: size, fidelity, right answers and speed of every recipe.

    nice python bench/quantization.py                        the demo model: quality and speed
    nice python bench/quantization.py --speed smollm2-135m   the speed of random weights in a real shape

The table is printed; all figures go into bench/results/.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from candidates import Candidate, OptimumCandidate, PilotlightCandidate, build_artifacts
from models import SHAPES
from models import write_model as write_random_model
from pilotlight.artifact import Artifact
from pilotlight_export.config import check_block_size
from pilotlight_export.errors import UnsupportedModel
from pilotlight_export.recipes import RECIPES, Recipe
from pilotlight_export.source import Source, open_source
from pilotlight_export.verify.graph_runner import Graphs
from pilotlight_export.verify.passages import sample_passages
from pilotlight_export.verify.prompts import Prompts

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "models" / "demo"
RESULTS = Path(__file__).parent / "results"
sys.path.insert(0, str(DEMO))
import corpus  # noqa: E402

NUM_ROWS = 8
PROMPT_TOKENS = 128
STEPS_PER_ROUND = 12
Figures = dict[str, float]


@dataclass(frozen=True)
class Text:
    """A question, and an answer whose tokens the candidates predict."""

    question: list[int]
    answer: list[int]


@dataclass(frozen=True)
class Speed:
    """Tokens per second: the median of all rounds, and half the distance between the quartiles in parts of it."""

    median: float
    spread: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEMO / "model", help="a model trained on the demo's corpus")
    parser.add_argument("--speed", choices=SHAPES, help="measure only speed, on random weights of this shape")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, help="all that fit the model's widths by default")
    parser.add_argument(
        "--no-optimum", action="store_true", help="leave out Optimum's int8, which takes minutes to make"
    )
    parser.add_argument("--questions", type=int, default=100, help="for each of the four tasks")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--name", help="of the file in bench/results; quantization by default")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        model = write_random_model(SHAPES[args.speed], directory / "model") if args.speed else args.model
        source = open_source(str(model), None)
        recipes = [RECIPES[name] for name in args.recipes] if args.recipes else _fitting(source)
        artifacts = build_artifacts(source, recipes, directory / "artifacts")
        candidates: list[Candidate] = [PilotlightCandidate(a, NUM_ROWS, args.threads) for a in artifacts.values()]
        if not args.no_optimum:
            candidates.append(OptimumCandidate(source, directory / "optimum", args.threads))
        rows: dict[str, Figures] = {candidate.name: _size(candidate, source) for candidate in candidates}
        if not args.speed:
            _add_quality(rows, candidates, source, artifacts["fp32"], args.questions)
        for column, speeds in measure_speeds(candidates, source.shapes.vocab_size, args.rounds).items():
            for row, speed in speeds.items():
                rows[row] |= {column: round(speed.median, 1), f"{column} spread": round(speed.spread, 3)}
    _report(rows, args.name or f"quantization{f'-{args.speed}' if args.speed else ''}", args.threads)


def _fitting(source: Source) -> list[Recipe]:
    found = []
    for recipe in RECIPES.values():
        with contextlib.suppress(UnsupportedModel):
            for block_size in recipe.block_sizes:
                check_block_size(source.config, block_size)
            found.append(recipe)
    return found


def _size(candidate: Candidate, source: Source) -> Figures:
    return {"MB": candidate.num_bytes / 1e6, "bytes/parameter": candidate.num_bytes / source.num_parameters}


def _add_quality(
    rows: dict[str, Figures], candidates: Sequence[Candidate], source: Source, exact: Artifact, num_questions: int
) -> None:
    tokenizer = Tokenizer.from_file(str(source.directory / "tokenizer.json"))
    turns = {task: corpus.held_out_turns(task, num_questions) for task in corpus.TASKS}
    held_out = [_text(tokenizer, turn) for several in turns.values() for turn in several[: num_questions // 2]]
    prompts, graphs = Prompts(source.directory), Graphs(exact.path, source.shapes)
    free = [Text(p.question, p.answer) for p in sample_passages(graphs, prompts, source.special_tokens.eos_ids)]
    expected = {"held-out": predict(candidates[0], held_out), "free": predict(candidates[0], free)}
    for candidate in candidates:
        figures = rows[candidate.name]
        for name, texts in (("held-out", held_out), ("free", free)):
            found = compare(expected[name], predict(candidate, texts), texts)
            figures |= {f"{name} {figure}": value for figure, value in found.items()}
        for task, several in turns.items():
            texts = [_text(tokenizer, turn) for turn in several]
            figures[f"{task} right"] = share_of_right_answers(candidate, texts)
        print(f"{candidate.name}: quality measured", file=sys.stderr)


def _text(tokenizer: Tokenizer, turn: corpus.Turn) -> Text:
    question = f"<|im_start|>user\n{turn.question}<|im_end|>\n<|im_start|>assistant\n"
    return Text(tokenizer.encode(question).ids, tokenizer.encode(f"{turn.answer}<|im_end|>").ids)


def predict(candidate: Candidate, texts: Sequence[Text]) -> list[NDArray[np.float64]]:
    """Return the log probabilities [T, V] at every token of each answer, read step by step in full batches."""
    predicted = []
    for first in range(0, len(texts), NUM_ROWS):
        batch = texts[first : first + NUM_ROWS]
        logits = [np.concatenate([candidate.start(row, text.question).copy() for row, text in enumerate(batch)])]
        for step in range(max(len(text.answer) for text in batch) - 1):
            tokens = np.array([text.answer[min(step, len(text.answer) - 1)] for text in batch])
            logits.append(candidate.step(tokens).copy())
        stacked = np.stack(logits, axis=1).astype(np.float64)
        predicted += [_log_softmax(row[: len(text.answer)]) for row, text in zip(stacked, batch, strict=True)]
    return predicted


def compare(
    expected: Sequence[NDArray[np.float64]], found: Sequence[NDArray[np.float64]], texts: Sequence[Text]
) -> Figures:
    """Compare predictions over all answers' tokens; divergences are in nats."""
    wanted, given = np.concatenate(list(expected)), np.concatenate(list(found))
    divergence = (np.exp(wanted) * (wanted - given)).sum(axis=-1)
    tokens = np.concatenate([text.answer for text in texts])[:, None]
    return {
        "perplexity": float(np.exp(-np.take_along_axis(given, tokens, axis=-1).mean())),
        "mean KL": float(divergence.mean()),
        "p99 KL": float(np.quantile(divergence, 0.99)),
        "top-1": float((wanted.argmax(axis=-1) == given.argmax(axis=-1)).mean()),
    }


def share_of_right_answers(candidate: Candidate, texts: Sequence[Text]) -> float:
    """Answer greedily; an answer counts only if it is right to the last token."""
    num_right = 0
    for first in range(0, len(texts), NUM_ROWS):
        batch = texts[first : first + NUM_ROWS]
        answers = [[int(candidate.start(row, text.question).argmax())] for row, text in enumerate(batch)]
        for _ in range(max(len(text.answer) for text in batch) - 1):
            tokens = candidate.step(np.array([answer[-1] for answer in answers])).argmax(axis=-1)
            for answer, token in zip(answers, tokens.tolist(), strict=True):
                answer.append(token)
        num_right += sum(a[: len(text.answer)] == text.answer for a, text in zip(answers, batch, strict=True))
    return num_right / len(texts)


def _log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


def measure_speeds(candidates: Sequence[Candidate], vocab_size: int, rounds: int) -> dict[str, dict[str, Speed]]:
    """Measure all candidates in turns, so that a busy moment of the machine hits all of them."""
    prompt = np.random.default_rng(1).integers(3, vocab_size, PROMPT_TOKENS).tolist()
    speeds = {}
    for num_rows in (1, NUM_ROWS):
        for candidate in candidates:
            for row in range(num_rows):
                candidate.start(row, prompt)
        speeds[f"decode b{num_rows}"] = _alternate(candidates, partial(_decode_speed, num_rows=num_rows), rounds)
    speeds["prefill"] = _alternate(candidates, partial(_prefill_speed, prompt=prompt), rounds)
    return speeds


def _alternate(candidates: Sequence[Candidate], measure: Callable[[Candidate], float], rounds: int) -> dict[str, Speed]:
    found: dict[str, list[float]] = {candidate.name: [] for candidate in candidates}
    for candidate in candidates:
        measure(candidate)
    for _ in range(rounds):
        for candidate in candidates:
            found[candidate.name].append(measure(candidate))
    return {name: _speed(values) for name, values in found.items()}


def _speed(values: Sequence[float]) -> Speed:
    low, median, high = np.quantile(values, [0.25, 0.5, 0.75])
    return Speed(float(median), float((high - low) / 2 / median))


def _decode_speed(candidate: Candidate, num_rows: int) -> float:
    tokens = np.full(num_rows, 5)
    began_at = time.perf_counter()
    for _ in range(STEPS_PER_ROUND):
        candidate.step(tokens)
    return num_rows * STEPS_PER_ROUND / (time.perf_counter() - began_at)


def _prefill_speed(candidate: Candidate, prompt: list[int]) -> float:
    began_at = time.perf_counter()
    candidate.start(0, prompt)
    return len(prompt) / (time.perf_counter() - began_at)


def _report(rows: dict[str, Figures], name: str, num_threads: int) -> None:
    RESULTS.mkdir(exist_ok=True)
    result = {"machine": _machine(num_threads), "rows": rows}
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    columns = [column for column in next(iter(rows.values())) if not column.endswith("spread")]
    print(f"| | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for row, figures in rows.items():
        print(f"| {row} | {' | '.join(f'{figures[column]:.4g}' for column in columns)} |")


def _machine(num_threads: int) -> str:
    """Describe the processor by what matters to the kernels."""
    flags = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
    known = {"avx2": "AVX2", "avx512f": "AVX-512", "avx512_vnni": "AVX-512 VNNI", "amx_int8": "AMX"}
    return ", ".join([f"{num_threads} threads", *(label for flag, label in known.items() if flag in flags)])


if __name__ == "__main__":
    main()
