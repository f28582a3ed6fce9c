"""What is in a file is checked before anything changes; what is written is whole, for whom the umask says."""

import io
import json
import os
import pickle
import struct
from concurrent.futures import ThreadPoolExecutor

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lora_exp.adapters import LoraConfig, LoraModel
from lora_exp.adapters.files.safetensors import read_tensors, write_tensors
from lora_exp.adapters.files.whole import write_text, write_whole
from lora_exp.errors import UserError


def values(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


@pytest.fixture(params=["file", "folder", "bin"])
def stored(request, make_tiny, tmp_path):
    """(tensors, write(tensors), load(into a model that has the adapter, or a new one)) of each kind of file."""
    config = LoraConfig(rank=2, target_modules=["q_proj"], use_dora=True)
    model = LoraModel(make_tiny(), config, verbose=False)
    if request.param == "file":
        path = tmp_path / "adapter.safetensors"
        model.save_model(path)
        metadata = {"lora_config": json.dumps(config.to_dict())}
        return load_file(path), lambda t: save_file(t, path, metadata=metadata), lambda: model.load_model(path), model
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    other = LoraModel(make_tiny(), LoraConfig(rank=1), verbose=False)
    if request.param == "bin":
        path.unlink()
        return (
            tensors,
            lambda t: torch.save(t, path.with_suffix(".bin")),
            lambda: other.load_adapter(tmp_path, "b"),
            other,
        )
    return tensors, lambda t: save_file(t, path), lambda: other.load_adapter(tmp_path, "b"), other


BAD = {
    "nan": (lambda t: t.clone().fill_(torch.nan), "NaN or infinity"),
    "one nan": (lambda t: torch.cat([t.flatten()[:-1], torch.tensor([torch.nan])]).view(t.shape), "NaN or infinity"),
    "infinity": (lambda t: t.clone().fill_(-torch.inf), "NaN or infinity"),
    "beyond float32": (lambda t: t.double().fill_(1e300), "NaN or infinity"),
    "integers": (lambda t: torch.ones_like(t, dtype=torch.int64), "int64"),
    "truth values": (lambda t: torch.ones_like(t, dtype=torch.bool), "bool"),
    "complex": (lambda t: t.to(torch.complex64), "complex64"),
    "another shape": (lambda t: t[:1].clone(), "is |rank"),
    "a scalar": (lambda t: torch.tensor(1.0), r"is \(\)"),
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("which", ["lora_A", "lora_B", "magnitude"])
def test_bad_values_are_refused_by_name(bad, which, stored):
    tensors, write, load, model = stored
    key = next(key for key in sorted(tensors) if which in key)
    change, match = BAD[bad]
    write({**tensors, key: change(tensors[key])})
    before = values(model)
    named = "" if bad in ("another shape", "a scalar") else key.replace(".", r"\.") + ".*"
    with pytest.raises(ValueError, match=f"{named}({match})|missing.*lora_A"):
        load()
    after = values(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_float_dtypes_are_read(dtype, stored):
    tensors, write, load, _ = stored
    write({key: value.to(dtype) for key, value in tensors.items()})
    load()


def header(**entries):
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


DAMAGED = {
    "empty": b"",
    "no header": b"\x01\x02",
    "a header as long as memory": struct.pack("<Q", 2**62) + b"{}",
    "a header cut short": struct.pack("<Q", 500) + b'{"a":',
    "a tensor larger than the file": header(a={"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}),
    "a shape that overflows": header(a={"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 4]}) + b"0000",
    "an unknown dtype": header(a={"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}) + b"0000",
    "overlapping tensors": header(
        a={"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
        b={"dtype": "F32", "shape": [1], "data_offsets": [2, 6]},
    )
    + b"000000",
    "text": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_files_are_said_to_be(damage, make_tiny, tmp_path):
    model = LoraModel(make_tiny(), LoraConfig(rank=2), verbose=False)
    model.save_pretrained(tmp_path)
    for name in ("adapter_model.safetensors", "one.safetensors", "adapter_model.bin"):
        (tmp_path / name).write_bytes(DAMAGED[damage])
        with pytest.raises(ValueError, match=f"{name} cannot be read"):
            model.load_model(tmp_path / name) if name[0] == "o" else model.load_adapter(tmp_path, "b")
        (tmp_path / name).unlink()


class RunsCode:
    """What a pickle may hold: a call that is made when it is read."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def saved(content, **how):
    stream = io.BytesIO()
    torch.save(content, stream, **how)
    return stream.getvalue()


def damaged_pickles(tensors, mark):
    """Files that were a PEFT pickle once, or never were, by what is wrong with them."""
    key = sorted(tensors)[0]
    whole, legacy = saved(tensors), saved(tensors, _use_new_zipfile_serialization=False)
    flipped = {
        f"byte {at} flipped": whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :] for at in range(0, 900, 150)
    }
    return {
        "half": whole[: len(whole) // 2],
        "end cut off": whole[:-30],
        "half, older format": legacy[: len(legacy) // 2],
        "end cut off, older format": legacy[:-7],
        "a pickle": pickle.dumps(RunsCode(mark)),
        "code among tensors": saved({**tensors, key: RunsCode(mark)}),
        "code, older format": saved({key: RunsCode(mark)}, _use_new_zipfile_serialization=False),
        "marks without end": b"\x80\x02" + b"(" * 100_000 + b".",
        "a text of 2 GiB": b"\x80\x02X\xff\xff\xff\x7fabc.",
        "numbers for names": saved({1: tensors[key]}),
        "no name": saved({**tensors, None: tensors[key]}),
        "sparse": saved({**tensors, key: tensors[key].to_sparse()}),
        "without values": saved({**tensors, key: tensors[key].to("meta")}),
        "complex": saved({**tensors, key: tensors[key].to(torch.complex64)}),
        "nothing": saved(None),
        **flipped,
    }


def test_damaged_pickles_end_in_one_error_and_run_nothing(make_tiny, tmp_path):
    model = LoraModel(make_tiny(), LoraConfig(rank=2, target_modules=["q_proj"]), verbose=False)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_model.safetensors").unlink()
    mark = tmp_path / "ran"
    said = {}
    for number, (name, content) in enumerate(damaged_pickles(tensors, mark).items()):
        (tmp_path / "adapter_model.bin").write_bytes(content)
        try:
            model.load_adapter(tmp_path, f"a{number}")
        except UserError as error:
            said[name] = str(error)
    assert {name for name in damaged_pickles(tensors, mark) if not name.startswith("byte")} <= set(said)
    assert len([name for name in said if name.startswith("byte")]) >= 3  # some bytes of a zip file mean nothing
    for name, text in said.items():
        assert "adapter_model.bin" in text, name
        assert "weights_only" not in text, name  # torch's own advice is to run it
    assert not mark.exists()


def test_a_pickle_of_something_else(make_tiny, tmp_path):
    model = LoraModel(make_tiny(), LoraConfig(rank=2, target_modules=["q_proj"]), verbose=False)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_model.safetensors").unlink()
    path = tmp_path / "adapter_model.bin"
    for content, match in (
        ([1, 2], "something else"),
        ({"a": "b"}, "something else"),
        (nn.Linear(2, 2), "cannot be read"),  # would run code
        (
            {**tensors, sorted(tensors)[0]: torch.empty(1).expand(2, 2**40)},
            r"is \(2, 1099511627776\)",
        ),  # 4 bytes on disk
    ):
        torch.save(content, path)
        with pytest.raises(ValueError, match=match):
            model.load_adapter(tmp_path, "b")


def test_integer_buffers_of_saved_modules_are_read(vision, images, tmp_path):
    vision(images)
    config = LoraConfig(rank=2, target_modules=["conv"], modules_to_save=["norm"])
    model = LoraModel(vision, config, verbose=False)
    model.wrapped.norm.copies["default"].num_batches_tracked.fill_(7)
    model.save_model(tmp_path / "a.safetensors")
    model.wrapped.norm.copies["default"].num_batches_tracked.fill_(0)
    model.load_model(tmp_path / "a.safetensors")
    assert model.wrapped.norm.copies["default"].num_batches_tracked == 7


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002, 0o077])
def test_files_have_the_mode_that_the_umask_says(umask, tiny, tmp_path):
    old = os.umask(umask)
    try:
        model = LoraModel(tiny, LoraConfig(rank=2), verbose=False)
        model.save_pretrained(tmp_path / "folder")
        model.save_model(tmp_path / "one.safetensors")
        model.save_model(tmp_path / "merged.safetensors", merge_weights=True)
        model.save_model(tmp_path / "one.safetensors")  # over an old one
    finally:
        os.umask(old)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 5
    assert {path.stat().st_mode & 0o777 for path in files} == {0o666 & ~umask}


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def fail(partial):
        partial.write_text("new")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_threads_that_write_one_file(tiny, tmp_path):
    model = LoraModel(tiny, LoraConfig(rank=2), verbose=False)
    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(model.save_pretrained, tmp_path / "folder") for _ in range(40)]:
            done.result()
    assert sorted(path.name for path in (tmp_path / "folder").iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip


def test_the_order_of_patterns_survives(make_tiny, tokens, randomised, tmp_path):
    """The first pattern that matches a layer counts, here and in PEFT; sorted, another one would."""
    torch.manual_seed(0)
    base, plain = make_tiny(), make_tiny()
    plain.load_state_dict(base.state_dict())
    patterns = {"v_proj": 3, "layers.1.v_proj": 300, r".*1\.q_proj": 2, "q_proj": 200}
    config = LoraConfig(rank=2, target_modules=["q_proj", "v_proj"], alpha_pattern=patterns)
    model = LoraModel(base, config, verbose=False)
    randomised(model)
    model.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(plain, str(tmp_path))
    torch.testing.assert_close(theirs(tokens), model(tokens), atol=1e-5, rtol=1e-4)
    model.save_model(tmp_path / "one.safetensors")
    other = LoraConfig(rank=2, target_modules=["q_proj", "v_proj"], alpha_pattern=dict(sorted(patterns.items())))
    with pytest.raises(ValueError, match="alpha_pattern"):
        LoraModel(make_tiny(), other, verbose=False).load_model(tmp_path / "one.safetensors")


@pytest.mark.parametrize("alpha", [1e30, 1_000_001])
def test_absurd_alphas_are_refused(alpha):
    with pytest.raises(ValueError, match=r"lora_alpha.*drown"):
        LoraConfig(lora_alpha=alpha)
    with pytest.raises(ValueError, match=r"alpha_pattern\['a'\]"):
        LoraConfig(alpha_pattern={"a": alpha})


def test_the_same_content_makes_the_same_bytes(tmp_path):
    """Whatever order safetensors happens to write its metadata in; and the file can be read as before."""
    tensors = {"weight": torch.arange(6.0).view(2, 3), "bias": torch.ones(3, dtype=torch.bfloat16)}
    metadata = {name: f'{name} α \\ "/\n\x07' for name in "abcdef"}
    written = set()
    for number in range(8):
        write_tensors(tmp_path / f"{number}", tensors, metadata)
        written.add((tmp_path / f"{number}").read_bytes())
    assert len(written) == 1
    read, found = read_tensors(tmp_path / "0")
    assert found == {"format": "pt", **metadata}
    for name, tensor in tensors.items():
        assert torch.equal(read[name], tensor)
