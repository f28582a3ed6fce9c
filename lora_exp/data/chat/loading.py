"""From records to rows: read, laid out, tokenised once, packed, and what is to be said of them."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_exp.data.broken import BadRecords
from lora_exp.data.chat.conversations import (
    BadRecordError,
    Conversation,
    Fields,
    Message,
    Record,
    is_learnt,
    to_conversation,
)
from lora_exp.data.chat.layouts import Laid, Layout, by_template, plain, raw, read_template
from lora_exp.data.chat.packing import Packed
from lora_exp.data.chat.source import sources
from lora_exp.data.chat.tokens import Conversations, Counts, Tokens, Writer, as_learnt, tokenise
from lora_exp.data.chat.writing import Written, questions_of
from lora_exp.data.kind import Data, Row
from lora_exp.data.rows import tokenizer_identity
from lora_exp.data.sources import records, unread_files
from lora_exp.data.split import SPLITS
from lora_exp.errors import UserError
from lora_exp.machine.cache import cache_folder, made_once

if TYPE_CHECKING:
    from torch.utils.data import Dataset
    from transformers import PreTrainedTokenizerBase

    from lora_exp.data.kinds.chat import Chat

_FORMAT = 1  # raised when rows made by an older version of these files would differ
_FACTS = "facts.json"
Placed = tuple[str, Conversation]


def load_chat(section: Chat, tokenizer: PreTrainedTokenizerBase) -> Data:
    """The rows. Raises UserError for data that cannot be had, or of which nothing is to be learnt."""
    bad = BadRecords(section.max_bad_fraction)
    read = {split: list(_conversations(section, split, bad)) for split in SPLITS}
    lay, described = layout_of(section, tokenizer)
    key = _key(section, read, tokenizer, described)
    maker = _Maker(section, tokenizer, lay, read)
    folder = made_once(cache_folder("datasets", section.label, key, section.cache_dir), maker.make)
    facts = json.loads((folder / _FACTS).read_text(encoding="utf-8"))
    for where, reason in facts["bad"]:
        bad.add(where, reason)
    bad.check()
    counts = {split: Counts(**facts["counts"][split]) for split in SPLITS}
    _check_learnt(section, counts["train"], "to train on")
    rows = {split: Conversations.read(folder / f"{split}.safetensors") for split in SPLITS}
    train: Any = rows["train"]
    said = [*unread_files(section), *bad.said(), *_said(section, counts)]
    if section.packing:
        train = Packed(train, train.lengths, section.max_length)
        said.append(
            f"{len(rows['train']):,} rows are packed into {len(train):,}, which they fill to {train.filled:.1%}"
        )
    return Data(
        train=train,
        validation=rows["validation"],
        rows=section.rows,
        shape={"max_length": section.max_length},
        test=rows["test"] if len(rows["test"]) else None,
        fingerprint=key,
        said=said,
        example=example(rows["train"][0], tokenizer),
        written=_written(section, tokenizer, rows["validation"]),
        written_of=functools.partial(_written, section, tokenizer),
    )


def _written(section: Chat, tokenizer: PreTrainedTokenizerBase, rows: Dataset[Row]) -> Written | None:
    if not section.written or not len(rows):  # type: ignore[arg-type]
        return None
    return Written(questions_of(rows, section.write_rows), tokenizer, section.written, section.write_tokens)


def layout_of(section: Chat, tokenizer: PreTrainedTokenizerBase) -> tuple[Layout, str]:
    """How conversations become text, and what that follows from."""
    if section.layout in ("plain", "raw"):
        return (plain if section.layout == "plain" else raw)(tokenizer), section.layout
    template = read_template(section.template) if section.template else None
    own = tokenizer.chat_template
    if template is None and not own:
        if section.layout == "auto":
            return plain(tokenizer), "plain"
        raise UserError(
            f"data.layout={section.layout}, and the model's tokenizer has no chat template: give one by "
            "data.template=FILE, or use data.layout=plain"
        )
    described = template if template is not None else json.dumps(own)
    options = section.template_options
    return by_template(tokenizer, template, options), json.dumps([described, options], sort_keys=True)


def example(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> str:
    """A row's text, dimmed where it is not learnt."""
    stretches = ((str(tokenizer.decode(ids)), learnt) for ids, learnt in as_learnt(row))
    return "".join(text if learnt else f"\x1b[2m{text}\x1b[22m" for text, learnt in stretches)


def _conversations(section: Chat, split: str, bad: BadRecords) -> Iterator[Placed]:
    names = Fields(**section.fields)

    def problem(record: Record) -> str | None:
        try:
            to_conversation(record, names, section.system)
        except BadRecordError as error:
            return str(error)
        return None

    if section.source:
        found = sources[section.source](**section.options).records(section, split)
    else:
        found = records(section, split, bad, problem)
    for where, record in found:
        yield where, to_conversation(record, names, section.system)


def _key(section: Chat, read: dict[str, list[Placed]], tokenizer: PreTrainedTokenizerBase, described: str) -> str:
    """The hash of all that the rows follow from: the conversations themselves, wherever they are from."""
    digest = hashlib.sha256()
    facts = [_FORMAT, tokenizer_identity(tokenizer), described, section.learn, section.max_length, section.overlong]
    digest.update(json.dumps(facts).encode())
    for split, placed in read.items():
        for _, conversation in placed:
            digest.update(json.dumps([split, asdict(conversation)], sort_keys=True, default=str).encode())
    return digest.hexdigest()[:20]


@dataclass(frozen=True)
class _Maker:
    """Fills a folder with the rows of each split and the facts about them."""

    section: Chat
    tokenizer: PreTrainedTokenizerBase
    lay: Layout
    read: dict[str, list[Placed]]

    def make(self, folder: Path) -> None:
        bad: list[tuple[str, str]] = []
        counts = {}
        for split, placed in self.read.items():
            writer = Writer(self.section.max_length)
            for tokens in self._tokens(placed, writer.counts, bad):
                writer.add(tokens)
            writer.write(folder / f"{split}.safetensors")
            counts[split] = asdict(writer.counts)
        (folder / _FACTS).write_text(json.dumps({"bad": bad, "counts": counts}), encoding="utf-8")

    def _tokens(self, placed: list[Placed], counts: Counts, bad: list[tuple[str, str]]) -> Iterator[Tokens]:
        laid, places = [], []
        for where, conversation in placed:
            try:
                found = self._laid(conversation)
            except BadRecordError as error:
                bad.append((where, str(error)))
                continue
            counts.split += len(found) > 1
            laid += found
            places += [where] * len(found)
        most = self.section.max_length
        for where, tokens in zip(places, tokenise(laid, self.tokenizer, self.section.learn == "all"), strict=True):
            if self.section.overlong == "broken" and len(tokens.ids) > most:
                bad.append((where, f"{len(tokens.ids):,} tokens, and data.max_length={most}"))
            else:
                yield tokens

    def _laid(self, conversation: Conversation) -> list[Laid]:
        """With ``learn=answers`` what stands behind the last answer is left out, as nothing is learnt there."""
        messages, learns_all = conversation.messages, self.section.learn == "all"
        last = max(index for index, message in enumerate(messages) if is_learnt(message))
        kept = messages if learns_all else messages[: last + 1]
        near = self._near(kept)
        found = self.lay(Conversation(near, conversation.tools))
        if len(near) < len(kept) and (len(found) > 1 or self._count(found[0].text) <= self.section.max_length):
            found = self.lay(Conversation(kept, conversation.tools))
        return found[-1:] if learns_all else found

    def _near(self, messages: list[Message]) -> list[Message]:
        """As many as fill a row, up to an answer: to lay out a long conversation takes the square of its length."""
        if self.section.overlong == "broken":  # whose length is told
            return messages
        count = 0
        for index, message in enumerate(messages):
            count += self._count(message["content"])
            if count > self.section.max_length and is_learnt(message):
                return messages[: index + 1]
        return messages

    def _count(self, text: str) -> int:
        return len(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _check_learnt(section: Chat, counts: Counts, what: str) -> None:
    if counts.rows:
        return
    if counts.unlearnt:
        raise UserError(
            f"Of {counts.unlearnt:,} conversations {what} none has a token to learn within data.max_length="
            f"{section.max_length}: raise it, or use data.learn=all"
        )
    raise UserError(f"data={section.label} has no conversation {what}: give more, or lower data.val_fraction")


def _said(section: Chat, counts: dict[str, Counts]) -> list[str]:
    all_of = Counts(**{name: sum(asdict(each)[name] for each in counts.values()) for name in asdict(Counts())})
    found = []
    if all_of.truncated:
        found.append(
            f"{all_of.truncated:,} rows are longer than data.max_length={section.max_length} and are cut there"
        )
    if all_of.unlearnt:
        found.append(f"{all_of.unlearnt:,} rows have no token to learn and are left out")
    if all_of.split:
        found.append(
            f"{all_of.split:,} conversations are several rows each, one an answer: "
            "the chat template writes earlier answers otherwise once there is a later one"
        )
    return found
