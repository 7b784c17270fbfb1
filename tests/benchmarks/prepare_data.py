"""Preparing data against the tokenizer alone, and its peak memory.

    python tests/benchmarks/prepare_data.py [--megabytes 100] [--line 0] [--vocab 8192] [--folder DIR] [--json FILE]

The data is JSON lines with the source code of installed packages, shuffled and repeated; the tokenizer is a byte-level
BPE, trained on a part of it. `meshpipe data prepare` runs in a process of its own, whose largest resident memory is
reported, and so does the tokenizer alone on the first 20 MB: texts of a megabyte at a time on all cores, whose tokens
are counted and dropped. The memory of a process that has only imported what it needs is shown, too.
`--line 50` adds one text of 50 MB, a single line of the file, which should cost little more than the line itself.
Rates are those of one machine and of what else it does: compare ratios.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
ALONE = """
import json, sys, time
from meshpipe.data import Tokenizer
tokenizer = Tokenizer(sys.argv[1])
batch, size, tokens, total, seconds = [], 0, 0, 0, 0.0
for line in open(sys.argv[2]):
    text = json.loads(line)["text"]
    batch.append(text)
    size += len(text)
    if size >= 1 << 20:
        began = time.perf_counter()
        tokens += sum(len(one.ids) for one in tokenizer._library.encode_batch_fast(batch))
        seconds += time.perf_counter() - began
        total += size
        batch, size = [], 0
    if total > 20_000_000:
        break
print(tokens / seconds)
"""
# Of the program itself: what the system reports of an ended process includes that of its parent.
PEAK = "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
PREPARE = f"import sys; from meshpipe.cli import main; status = main(sys.argv[1:]); {PEAK}; sys.exit(status)"


def write_data(folder: Path, megabytes: int, line: int, vocab: int) -> tuple[Path, Path]:
    """The file of JSON lines and the tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    from meshpipe.data.text_files import PACKAGES, package_files, read

    texts = [
        bytes(text).decode(errors="ignore")
        for name in PACKAGES
        for text in read(package_files(name), max_bytes=3 << 20)
    ]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    rng = random.Random(0)
    tokenizer.train_from_iterator(rng.sample(texts, min(len(texts), 200)), trainer)
    file = folder / "tokenizer.json"
    tokenizer.save(str(file))
    data, size = folder / "data.jsonl", 0
    with data.open("w") as stream:
        while size < megabytes * 1_000_000:
            size += stream.write(f"{json.dumps({'text': rng.choice(texts), 'id': size})}\n")
        longest, left = list[str](), line * 1_000_000
        while left > 0:
            longest.append(rng.choice(texts))
            left -= len(longest[-1])
        if longest:
            stream.write(f"{json.dumps({'text': ''.join(longest), 'id': size})}\n")
    return data, file


def measured(*command: str) -> tuple[float, str, float]:
    """Seconds of a Python program, what it prints, and its largest resident memory in bytes."""
    began = time.monotonic()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run([sys.executable, *command], stdout=subprocess.PIPE, text=True, check=True, env=environment)
    *lines, last = ended.stdout.splitlines()
    return time.monotonic() - began, "\n".join(lines), float(last) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--line", type=int, default=0)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--json", type=Path)
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=flags.folder) as name:
        folder = Path(name)
        data, tokenizer = write_data(folder, flags.megabytes, flags.line, flags.vocab)
        idle = measured("-c", f"import meshpipe.data.preparation, meshpipe.cli, tokenizers; {PEAK}")[2]
        rate = float(measured("-c", f"{ALONE}\n{PEAK}", str(tokenizer), str(data))[1])
        arguments = ["data", "prepare", str(data), "--tokenizer", str(tokenizer), "--to", str(folder / "to")]
        seconds, _, peak = measured("-c", PREPARE, *arguments, "--sequence-length", "2048")
        manifest = json.loads((folder / "to" / "prepared.json").read_text())
        tokens = sum(counts["pairs"] for counts in manifest["counts"].values())
    values = {
        "source, MB": flags.megabytes + flags.line,
        "longest line, MB": flags.line,
        "tokens, million": tokens / 1e6,
        "seconds": seconds,
        "million tokens/s": tokens / seconds / 1e6,
        "million tokens/s of the tokenizer alone": rate / 1e6,
        "ratio": tokens / seconds / rate,
        "peak memory, MB": peak / 1e6,
        "of which imports, MB": idle / 1e6,
    }
    for name, value in values.items():
        print(f"{name:42} {value:,.2f}")
    if flags.json is not None:
        flags.json.write_text(json.dumps(values))


if __name__ == "__main__":
    main()
