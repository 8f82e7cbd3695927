"""Kills runs at random moments (SIGKILL), resumes them, and compares all they leave byte for byte.

    python experiments/kills.py                # 40 kills of 4 kinds of run: a table, status 0 or 1

Each kind of run is run once undisturbed, then again and again, killed once to three times on its
way, and resumed. SAE files must be equal byte for byte, report.json and the lines of metrics.jsonl
but for seconds, and nothing else may be left in the folder.
"""

import argparse
import json
import multiprocessing
import os
import random
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import saeft
from experiments import baselines

SMALL = (
    "--tokens 12k --kl-tokens 5k --eval-tokens 2k --context 64 --d-sae 64 --batch 256 --kl-batch 2"
    " --buffer 40 --warmup 5 --dead-after 2k --log-every 3"
)
RUNS = {
    "topk": "--k 4 8 --method kl mse",
    "batchtopk": "--sae batchtopk --k 4 8 --method kl",
    "relu": "--sae relu --k 4 --method kl-only kl",
    "lora-sae": "--k 4 --rank 2 --method lora-sae linear-adapter",  # dropout draws random numbers
}
MAY_DIFFER = {"seconds", "resume", "out", "name", "checkpoint_minutes"}


def child(line: str, log: str) -> None:
    """What a process runs: a command line of experiments/baselines.py."""
    torch.set_num_threads(1)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.exit(saeft.main(line.split(), baselines.METHODS))


def start(line: str, log: Path):
    """A process that runs it. It is forked from one in which torch is imported already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["experiments.kills"])
    process = context.Process(target=child, args=(line, str(log)))
    process.start()
    return process


def finish(line: str, log: Path) -> float:
    """Runs it to its end; the seconds that took."""
    began = time.monotonic()
    process = start(line, log)
    process.join()
    if process.exitcode != 0:
        raise RuntimeError(f"{line}: status {process.exitcode}\n{log.read_text()}")
    return time.monotonic() - began


def kill(line: str, log: Path, seconds: float) -> str:
    """Runs it, and kills it after some time; the phase it was in, or "" if it ended before."""
    process = start(line, log)
    process.join(seconds)
    killed = process.is_alive()
    process.kill()
    process.join()
    folder = log.with_suffix("")
    lines = folder / "metrics.jsonl"
    if not killed:
        return ""
    phases = [json.loads(text)["phase"] for text in whole_lines(lines)]
    return phases[-1] if phases else "start"


def whole_lines(path: Path) -> list[str]:
    text = path.read_text() if path.exists() else ""
    return text[: text.rfind("\n") + 1].splitlines()


def without(value):
    """JSON without the keys that may differ."""
    if isinstance(value, dict):
        return {key: without(v) for key, v in value.items() if key not in MAY_DIFFER}
    return [without(v) for v in value] if isinstance(value, list) else value


def left(folder: Path) -> dict[str, object]:
    """All that stands in a run's folder, by path, without what may differ."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.name in ("report.json", "config.json"):
            found[name] = without(json.loads(path.read_text()))
        elif path.name == "metrics.jsonl":
            found[name] = [without(json.loads(line)) for line in path.read_text().splitlines()]
        elif path.is_file():
            found[name] = path.read_bytes()
    return found


def differences(a: Path, b: Path) -> list[str]:
    """Names of what differs between two runs' folders."""
    first, second = left(a), left(b)
    return [n for n in sorted({*first, *second}) if first.get(n) != second.get(n)]


def trial(line: str, folder: Path, seconds: float, kills: int, draw: random.Random) -> list[str]:
    """A run of so many seconds in a folder, killed and resumed; the phases in which it was."""
    log = folder.with_suffix(".log")
    line = f"{SMALL} {line} --out {folder.parent} --name {folder.name}"
    line += f" --checkpoint-minutes {draw.choice([0, 0.001, 0.005])}"
    phases = [kill(line, log, draw.uniform(0.02, 1) * seconds)]
    for _ in range(kills - 1):
        phases.append(kill(f"{line} --resume", log, draw.uniform(0.02, 0.7) * seconds))
        if not phases[-1]:
            break
    if phases[-1]:
        finish(f"{line} --resume", log)
    return [phase for phase in phases if phase]


def undisturbed(line: str, folder: Path) -> float:
    """The run to compare with; its seconds."""
    line = f"{SMALL} {line} --out {folder.parent} --name {folder.name}"
    return finish(line, folder.with_suffix(".log"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/kills"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    draw, done, wrong, number = random.Random(args.seed), 0, 0, 0
    seconds = {}
    for name, line in RUNS.items():
        seconds[name] = undisturbed(line, args.out / name)
        print(f"{name}: {line}, {seconds[name]:.1f} s undisturbed")
    print(f"{'run':>4} {'kind':10} {'kills':>5}  {'killed in':35}differs from the undisturbed in")
    while done < args.kills:
        name = list(RUNS)[number % len(RUNS)]
        number += 1
        folder = args.out / f"{name}-{number}"
        phases = trial(RUNS[name], folder, seconds[name], draw.randint(1, 3), draw)
        done += len(phases)
        found = differences(args.out / name, folder)
        wrong += bool(found)
        row = f"{number:4} {name:10} {len(phases):5}  {', '.join(phases):35}"
        print(row + (", ".join(found) or "nothing"), flush=True)
    print(f"{done} kills, {number} runs, {wrong} of them differ")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
