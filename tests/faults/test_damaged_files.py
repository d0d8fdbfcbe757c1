"""Damaged and crafted files: a FileFormatError when they are loaded, before memory is spent, and nothing raw after."""

import copy
import io
import json
import random
import resource
import warnings
import zipfile

import numpy as np
import pytest
import torch
from helpers import reference
from safetensors.torch import save_file

import rewrite_core as rc
from rewrite_core.files import from_json, read_state_dict

Z = rc.sample_latents(4, 40)


def generator():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Unflatten(1, (4, 1, 1)), torch.nn.Conv2d(4, 6, 1), torch.nn.Conv2d(6, 3, 1))


@pytest.fixture(scope="module")
def layer():
    return rc.bind(generator(), "2")


@pytest.fixture
def moment(layer):
    return rc.collect_second_moment(layer, Z, batch_size=4, progress=False)


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


def parts(data):
    """The header of a safetensors file, and what follows it."""
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def joined(header, tensors):
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + tensors


def with_metadata(data, change):
    """The file with ``change(metadata)`` in the place of its metadata; what `change` returns may be any text."""
    header, tensors = parts(data)
    header["__metadata__"]["metadata"] = change(json.loads(header["__metadata__"]["metadata"]))
    return joined(header, tensors)


ODD = [[], {}, "5", True, 0.5, -1, 2**63, None, float("nan"), float("inf"), nested(100), "\x1b[2J"]
FIELDS = ["count", "skipped", "groups", "spread", "wide", "layer", "fingerprint", "latents", "key_errors", "progress"]


@pytest.mark.parametrize("field", FIELDS)
def test_fields_of_wrong_types(tmp_path, layer, moment, field):
    path = tmp_path / "m"
    moment.save(path)
    good, refused = path.read_bytes(), 0
    for value in ODD:
        path.write_bytes(with_metadata(good, lambda metadata, value=value: json.dumps(metadata | {field: value})))
        try:
            found = rc.SecondMoment.load(path)
        except rc.FileFormatError:
            refused += 1
            continue
        assert len(repr(found)) < 200 and repr(found).isprintable()
        use_all(found, layer, path)
    assert refused >= (6 if field in ("layer", "fingerprint", "spread", "key_errors") else 8)


def use_all(moment, layer, path):
    """Every method; what goes wrong is told by the library's own exceptions."""
    for use in (
        lambda: moment.check(layer, Z),
        lambda: moment.merge(rc.SecondMoment.load(path)),
        lambda: moment.solve(torch.ones(moment.channels)),
        lambda: moment.standard_error,
        lambda: moment.save(path.with_name("again")),
        lambda: moment.update(torch.ones(2, moment.channels)),
    ):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                use()
        except rc.RewriteCoreError as error:
            assert len(str(error)) < 700 and str(error).isprintable()


@pytest.mark.parametrize(
    "text", ["[" * 3000, "9" * 5000, "{}", "null", '"5"', "[1]", "NaN", "-1", '{"a":' * 900 + "1"], ids=len
)
def test_metadata_that_is_none(tmp_path, moment, text):
    path = tmp_path / "m"
    moment.save(path)
    for key in ("metadata", "format", "version"):
        header, tensors = parts(path.read_bytes())
        header["__metadata__"][key] = text
        (tmp_path / "bad").write_bytes(joined(header, tensors))
        with pytest.raises(rc.FileFormatError) as caught:
            rc.SecondMoment.load(tmp_path / "bad")
        assert len(str(caught.value)) < 500


def test_json_that_goes_too_deep_or_is_none():
    for text in (
        "[" * 5000 + "]" * 5000,
        "[" * 40 + "]" * 40,
        '{"a":' * 40 + "1" + "}" * 40,
        "9" * 5000,
        "{",
        b"\xff\xfe\xfd",
    ):
        with pytest.raises(rc.FileFormatError, match="The thing"):
            from_json(text, "The thing")
    assert from_json("[[[1, null]]]", "it") == [[[1, None]]]


@pytest.mark.parametrize(
    "tensors",
    [
        {"sum": torch.eye(6, dtype=torch.float64).to(torch.float8_e4m3fn)},
        {"sum": torch.eye(6)},
        {"sum": torch.eye(6, dtype=torch.complex64)},
        {"sum": torch.zeros(6, dtype=torch.float64)},
        {"sum": torch.zeros(2, 3, dtype=torch.float64)},
        {"sum": torch.full((6, 6), torch.nan, dtype=torch.float64)},
        {"sum": -torch.eye(6, dtype=torch.float64)},
        {"other": torch.eye(6, dtype=torch.float64)},
    ],
    ids=lambda tensors: "-".join(f"{name} {tuple(value.shape)} {value.dtype}" for name, value in tensors.items()),
)
def test_sums_of_wrong_types(tmp_path, tensors):
    metadata = {"format": "rewrite_core.second_moment", "version": "1", "metadata": '{"count": 3}'}
    save_file(tensors, tmp_path / "m", metadata=metadata)
    with pytest.raises(rc.FileFormatError, match="holds no"):
        rc.SecondMoment.load(tmp_path / "m")


def test_headers_that_claim_more_than_there_is(tmp_path):
    for header, tensors in (
        ({"sum": {"dtype": "F64", "shape": [2**40, 2**40], "data_offsets": [0, 8]}}, bytes(8)),
        ({"sum": {"dtype": "F64", "shape": [10**6, 10**6], "data_offsets": [0, 8 * 10**12]}}, bytes(8)),
        ({"sum": {"dtype": "F99", "shape": [1], "data_offsets": [0, 8]}}, bytes(8)),
        ({"sum": {"dtype": "F64", "shape": [-1], "data_offsets": [0, 8]}}, bytes(8)),
        ({"sum": 5}, b""),
    ):
        (tmp_path / "m").write_bytes(joined(header, tensors))
        with pytest.raises(rc.FileFormatError):
            rc.SecondMoment.load(tmp_path / "m")
    (tmp_path / "m").write_bytes((2**63).to_bytes(8, "little") + b"{}")
    with pytest.raises(rc.FileFormatError):
        rc.SecondMoment.load(tmp_path / "m")


def resident():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def bomb(path, header_shape, size):
    """A small .npz whose one array unpacks to `size` bytes of zeros, and says that it has `header_shape`."""
    data = io.BytesIO()
    np.lib.format.write_array_header_1_0(data, {"descr": "<f8", "fortran_order": False, "shape": header_shape})
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("mom2.npy", "w") as member:
        member.write(data.getvalue())
        for _ in range(size >> 20):
            member.write(bytes(1 << 20))


@pytest.mark.parametrize("read", [rc.SecondMoment.load, read_state_dict], ids=["moment", "state dict"])
def test_archives_that_unpack_to_far_more(tmp_path, read):
    path = tmp_path / "b.npz"
    bomb(path, (6400, 10240), 500 << 20)
    before = resident()
    with pytest.raises(rc.FileFormatError, match="would take .* in memory"):
        read(path)
    bomb(path, (2**20, 2**20), 1 << 20)
    with pytest.raises(rc.FileFormatError, match="truncated: an array of"):
        read(path)
    assert resident() - before < 100 << 20


def test_tensors_that_repeat_their_numbers(tmp_path):
    """By strides of zero, a file of a kilobyte is terabytes in memory as soon as somebody copies them."""
    torch.save({"a": torch.zeros(1).expand(2**20, 2**20)}, tmp_path / "s.pt")
    with pytest.raises(rc.FileFormatError, match="would take 4398046511104 in memory"):
        read_state_dict(tmp_path / "s.pt")
    torch.save({"a": torch.ones(1).expand(64, 64), "b": torch.ones(3)}, tmp_path / "s.pt")
    assert read_state_dict(tmp_path / "s.pt")["a"].shape == (64, 64)
    torch.save({"a": torch.zeros(3, device="meta")}, tmp_path / "s.pt")
    with pytest.raises(rc.FileFormatError, match="meta device"):
        read_state_dict(tmp_path / "s.pt")


def test_arrays_of_odd_types(tmp_path):
    wide = np.finfo(np.longdouble).bits > 64
    for odd, fine in (
        (np.array(["a", "b"]), False),
        (np.eye(2, dtype="M8[s]"), False),
        (np.zeros(3, [("a", "f4")]), False),
        (np.eye(2, dtype=np.longdouble), not wide),
        (np.eye(2, dtype=">f8"), True),
        (np.eye(2, dtype=np.uint16), True),
        (np.float16(3), True),
    ):
        np.savez(tmp_path / "s.npz", a=odd)
        if fine:
            assert torch.equal(read_state_dict(tmp_path / "s.npz")["a"].double(), torch.tensor(odd.astype(np.float64)))
        else:
            with pytest.raises(rc.FileFormatError, match="which no tensor has"):
                read_state_dict(tmp_path / "s.npz")
        assert fine or read_state_dict({"b": np.eye(2)})
    for count in (np.array("5"), np.array([5, 6]), 1.5, np.nan, np.inf, 0, -1, np.uint64(2**63), True, 1j):
        np.savez(tmp_path / "r2m.npz", mom2=np.eye(3), count=count)
        with pytest.raises(rc.FileFormatError, match=r"reference's r2m\.npz"):
            rc.SecondMoment.load(tmp_path / "r2m.npz")
    np.savez(tmp_path / "r2m.npz", mom2=np.eye(3, dtype=">f4"), count=np.array([5.0]))
    assert rc.SecondMoment.load(tmp_path / "r2m.npz").count == 5


def test_checkpoints_of_a_collection(tmp_path, layer, monkeypatch):
    """Whatever is in them: they go on to the right result, or are refused."""
    ticks, bad, path = iter(range(0, 10**9, 100)), Z.clone(), tmp_path / "c"
    monkeypatch.setattr("rewrite_core.statistics.collection.time.monotonic", lambda: next(ticks))
    bad[32:] = torch.nan
    keys = torch.eye(6)[:2]

    def collect():
        return rc.collect_second_moment(
            layer, bad, batch_size=4, keys=keys, checkpoint=path, skip_nonfinite=path.exists(), progress=False
        )

    with pytest.raises(rc.NonFiniteError):
        collect()
    good, random_ = path.read_bytes(), random.Random(0)
    for _ in range(60):
        where, value = random_.choice(["latents", "progress", "count", "groups"]), random_.choice(ODD)
        inner = random_.choice(["count", "used", "done", "batch_size", "merged", "fingerprint", "recipe", None])

        def change(metadata, where=where, inner=inner, value=value):
            if inner is None or not isinstance(metadata[where], dict):
                return json.dumps(metadata | {where: value})
            return json.dumps(metadata | {where: metadata[where] | {inner: value}})

        path.write_bytes(with_metadata(good, change))
        try:
            assert collect().latents["count"] == 40
        except rc.RewriteCoreError as error:
            assert len(str(error)) < 700


def mutated(data, random_):
    """The file cut, with a few bytes changed or left out, or with something behind it."""
    kind, data = random_.randrange(4), bytearray(data)
    if kind == 0:
        return bytes(data[: random_.randrange(len(data))])
    if kind == 1:
        return bytes(data) + random_.randbytes(random_.randrange(1, 40))
    if kind == 2:
        start = random_.randrange(len(data))
        del data[start : start + random_.randrange(1, 40)]
        return bytes(data)
    for _ in range(random_.choice([1, 1, 4, 20])):
        data[random_.randrange(min(len(data), random_.choice([40, 600, 10**9])))] = random_.randrange(256)
    return bytes(data)


@pytest.mark.parametrize("kind", ["moment", "r2m.npz", "s.npz", "s.pt", "s.safetensors"])
def test_files_changed_at_random(tmp_path, layer, moment, kind):
    path, again = tmp_path / kind, tmp_path / f"again.{kind}"
    state = {name: value.detach() for name, value in generator().state_dict().items()}
    if kind == "moment":
        moment.save(path)
    elif kind == "r2m.npz":
        np.savez_compressed(path, mom2=np.eye(6, dtype=np.float32), count=7)
    elif kind == "s.npz":
        np.savez(path, **{name: value.numpy() for name, value in state.items()})
    elif kind == "s.pt":
        torch.save({"state_dict": copy.deepcopy(state)}, path)
    else:
        save_file(state, path)
    good, random_ = path.read_bytes(), random.Random(1)
    read = read_state_dict if kind.startswith("s.") else rc.SecondMoment.load
    refused = 0
    for _ in range(150):
        again.write_bytes(mutated(good, random_))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = read(again)
        except rc.FileFormatError as error:
            refused += 1
            assert str(error).isprintable() and len(str(error)) < 700
            continue
        if kind == "moment":
            use_all(found, layer, again)
    assert refused > 50


@pytest.mark.parametrize("field", ["layer", "solver", "fitted_to", "loss", "groups", "size", "edit"])
def test_rewrites_with_fields_of_wrong_types(tmp_path, layer, moment, field):
    mask = np.ones((1, 1))
    edit = rc.Edit(copy=rc.Selection(0, mask), paste=rc.Selection(1, mask), context=[rc.Selection(1, mask)])
    path = tmp_path / "r"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference.rewrite(layer, moment, edit, Z, loss="l2").save(path)
    good = path.read_bytes()
    for value in (*ODD, 10**400, [10**400], ["x"], "y" * 5000):
        path.write_bytes(with_metadata(good, lambda metadata, value=value: json.dumps(metadata | {field: value})))
        try:
            found = rc.Rewrite.load(path)
            assert repr(found).isprintable() and len(repr(found)) < 300
            found.apply(generator(), force=True)
        except rc.RewriteCoreError as error:
            assert len(str(error)) < 700 and str(error).isprintable()
