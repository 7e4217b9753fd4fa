"""How many drafts hold, and what that does to the seconds of a token: greedy answers in the clear, costs by prediction.

    python benchmarks/drafts.py MODEL [--draft FOLDER] [--write]

MODEL is a folder that transformers saved or a GGUF file. It answers some prompts greedily in plaintext; then the drafts
that a client would make of each answer are compared with it, pass by pass. Prompts are code (files of Python's standard
library, to be gone on with) and, for a model with a chat template, messages: questions, and texts to be rewritten.
"""

from __future__ import annotations

import argparse
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from entropi.chat import ids_of
from entropi.costs.prediction import CostModel, Predictor, described
from entropi.costs.preparation import PreparedPredictor
from entropi.machine import machine
from entropi.model.reading import Reader
from entropi.model.shape import read_shape
from entropi.private.sessions.drafting import Drafter, ModelDrafter, NgramDrafter, Window
from entropi.private.sessions.sampling import GREEDY
from entropi.training.loading import open_chat_form, open_reading

RESULTS = Path(__file__).parent / "results" / "drafts.md"
FILES = ("json/decoder.py", "argparse.py", "configparser.py", "shlex.py", "csv.py", "statistics.py")
QUESTIONS = (
    "What is a prime number?",
    "How do I boil an egg?",
    "Name three rivers in Europe and say where they end.",
)
TEXTS = (
    "A conversation is one session: what was said stays shared between both sides, and a message costs its own tokens.",
    "The museum opens at nine in the morning and closes at six in the evening. On Mondays it is closed. A ticket costs "
    "twelve euros, and eight for students and pupils.",
)
REWRITE = "Correct the spelling of this text and give it back otherwise unchanged: "
NETWORKS = ("wan", "lan")
LONGEST = (1, 2, 4, 8)


@dataclass
class Kept:
    """Passes of answers after that over the prompt: by the number of drafts, and tokens that they made."""

    passes: dict[int, int]
    tokens: int

    @property
    def by_pass(self) -> float:
        """Tokens a pass."""
        return self.tokens / sum(self.passes.values())


def answer(reader: Reader, prompt: list[int], count: int, ends: set[int]) -> list[int]:
    """The greedy continuation, up to the first token that ends a text."""
    reading, found = reader.read(prompt), list[int]()
    while len(found) < count and not (found and found[-1] in ends):
        found.append(int(np.argmax(reading.logits)))
        reading.go_on(found[-1])
    return found


def kept(drafter: Drafter, longest: int, prompt: list[int], found: list[int], vocab_size: int, counts: Kept) -> None:
    """Count the passes of an answer with drafts of at most `longest` tokens."""
    window, done, random = Window(), 1, np.random.default_rng(0)
    while done < len(found):
        most = min(longest, window.size, len(found) - done - 1)
        known = [*prompt, *found[:done]]
        drafts = drafter.draft(known, most, vocab_size, GREEDY, random).tokens if most else []
        held = 0
        while held < len(drafts) and drafts[held] == found[done + held]:
            held += 1
        window.note(len(drafts), held)
        counts.passes[len(drafts)] = counts.passes.get(len(drafts), 0) + 1
        counts.tokens += held + 1
        done += held + 1


def prompts(model: Path, tokenizer, length: int, many: int) -> Iterator[tuple[str, list[int]]]:
    """Kind and token ids."""
    library = Path(sysconfig.get_path("stdlib"))
    for name in FILES[:many]:
        ids = tokenizer.encode((library / name).read_text(), add_special_tokens=False).ids
        yield "code", ids[len(ids) // 3 :][:length]
    if (form := open_chat_form(model)) is None:
        return
    messages = [("question", text) for text in QUESTIONS] + [("rewriting", REWRITE + text) for text in TEXTS]
    for kind, message in messages:
        pieces = form.turn(message, None, begins=True)
        yield kind, ids_of(pieces, lambda text: tokenizer.encode(text, add_special_tokens=False).ids)


def seconds(shape, length: int) -> dict[tuple[str, bool], list[float]]:
    """Seconds of a pass with 0, 1, ... drafts after `length` tokens, by network and whether it is prepared."""
    found = {}
    description = described(shape)
    for network in NETWORKS:
        costs = CostModel.shipped("cheetah", network)
        for prepared in (False, True):
            predictor = (PreparedPredictor if prepared else Predictor)(description, costs)
            predictor.run(length)
            found[network, prepared] = [predictor.run_drafted(drafts).latency for drafts in range(max(LONGEST) + 1)]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--draft", type=Path, help="folder of a smaller model of the same tokenizer")
    parser.add_argument("--prompt-tokens", type=int, default=256, help="of code")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--files", type=int, default=3, help="of the standard library")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name}")
    options = parser.parse_args()

    model, tokenizer = open_reading(options.model)
    reader = Reader(model, tokenizer.get_vocab(), str(options.model))
    ends = model.generation_config.eos_token_id if model.generation_config is not None else None
    ends = set(ends if isinstance(ends, list) else [] if ends is None else [ends])
    drafters: dict[str, Drafter] = {"ngram": NgramDrafter()}
    if options.draft is not None:
        other, vocabulary = open_reading(options.draft)
        drafters[options.draft.name] = ModelDrafter(Reader(other, vocabulary.get_vocab(), str(options.draft)))

    counts: dict[tuple[str, str, int], Kept] = {}
    number: dict[str, int] = {}
    for kind, prompt in prompts(options.model, tokenizer, options.prompt_tokens, options.files):
        found = answer(reader, prompt, options.new_tokens, ends)
        number[kind] = number.get(kind, 0) + 1
        for name, drafter in drafters.items():
            for longest in LONGEST:
                place = counts.setdefault((kind, name, longest), Kept({}, 0))
                kept(drafter, longest, prompt, found, len(reader.vocabulary), place)
        print(kind, len(prompt), repr(tokenizer.decode(found))[:100], flush=True)

    costs = seconds(read_shape(options.model), options.prompt_tokens)
    page = "\n".join(report(options, counts, number, costs)) + "\n"
    print(page)
    if options.write:
        RESULTS.write_text(page)


def report(options, counts, number, costs) -> Iterator[str]:
    yield "# Drafts\n"
    words = " ".join(
        f"--{name.replace('_', '-')} {value}" for name, value in vars(options).items() if name in ASKED and value
    )
    yield f"`python benchmarks/drafts.py {options.model.name} {words}`, {machine()}.\n"
    yield (
        "Greedy answers of the model in the clear, and how many tokens a pass makes on average after the prompt's. "
        f"Seconds a token are predicted for the model's shape after {options.prompt_tokens} tokens (CHEETAH, both "
        "parties on the calibrated machine), by the passes that there were. Prepared: seconds online.\n"
    )
    heads = [f"{network}{', prepared' * prepared}" for network, prepared in costs]
    yield "| prompts | drafts | at most | tokens a pass | " + " | ".join(f"s a token, {head}" for head in heads) + " |"
    yield "|---" * (4 + len(heads)) + "|"
    for kind in number:
        plain = " | ".join(f"{passes[0]:.1f}" for passes in costs.values())
        yield f"| {kind} ({number[kind]}) | none | - | 1 | {plain} |"
        for (which, name, longest), one in counts.items():
            if which == kind:
                spent = (sum(n * passes[d] for d, n in one.passes.items()) / one.tokens for passes in costs.values())
                cells = " | ".join(f"{value:.1f}" for value in spent)
                yield f"| | {name} | {longest} | {one.by_pass:.2f} | {cells} |"
    yield "\nSeconds of a pass by the number of its drafts, and how many have to hold for it to pay:\n"
    yield "| drafts | " + " | ".join(heads) + " |"
    yield "|---" * (1 + len(heads)) + "|"
    for drafts in (0, *LONGEST):
        cells = (f"{passes[drafts]:.1f} ({passes[drafts] / passes[0] - 1:.2f})" for passes in costs.values())
        yield f"| {drafts} | " + " | ".join(cells) + " |"


ASKED = ("draft", "prompt_tokens", "new_tokens", "files")


if __name__ == "__main__":
    main()
