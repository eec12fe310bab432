import json
import struct

import jax
import ml_dtypes
import numpy as np
import pytest

from models import checkpoint

safetensors_numpy = pytest.importorskip(
    "safetensors.numpy", reason="loading weights needs safetensors"
)

# What pickle makes of {'weight': [1, 2, 3]}; nothing here may ever read it.
PICKLE = (
    b"\x80\x04\x95\x20\x00\x00\x00\x00\x00\x00\x00}\x94\x8c\x06weight\x94]\x94("
    b"K\x01K\x02K\x03es." + bytes(16)
)
TENSORS = {
    "a.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.array([1.5, np.nan, -np.inf], ml_dtypes.bfloat16),
    "c": np.float16(np.arange(4)),
    "none": np.zeros((0, 2), np.float32),
    "scalar": np.array(2, np.float32),
}
SHAPES = {name: tensor.shape for name, tensor in TENSORS.items()}


@pytest.fixture
def folder(tmp_path):
    safetensors_numpy.save_file(TENSORS, tmp_path / "model.safetensors")
    return tmp_path


def split(path):
    """Return the parsed header and the rest of a file."""
    content = path.read_bytes()
    end = 8 + struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8:end]), content[end:]


def join(header, rest):
    header = json.dumps(header).encode()
    return struct.pack("<Q", len(header)) + header + rest


def test_what_was_written_is_read_bit_for_bit(folder):
    tensors = checkpoint.read_tensors(folder, SHAPES)
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert tensors[name].shape == tensor.shape
        assert tensors[name].tobytes() == tensor.tobytes()


def test_all_tensors_at_fault_are_listed_in_one_error(folder):
    shapes = SHAPES | {"a.weight": (3, 2), "lost": (4,), "gone": (1, 2)}
    del shapes["c"], shapes["scalar"]
    with pytest.raises(ValueError) as error:
        checkpoint.read_tensors(folder, shapes)
    assert str(error.value).splitlines()[1:] == [
        "  missing: 'gone' (1, 2)",
        "  missing: 'lost' (4,)",
        "  not expected: 'c' (4,)",
        "  not expected: 'scalar' ()",
        "  wrong shape: 'a.weight' (2, 3); expected (3, 2)",
    ]


def test_optional_tensors_may_be_there_or_not(folder):
    shapes = SHAPES | {"lost": (4,)}
    del shapes["c"]
    tensors = checkpoint.read_tensors(folder, shapes, optional=["lost", "c", "b"])
    assert tensors.keys() == TENSORS.keys() - {"c"}


def test_an_optional_tensor_that_is_there_has_its_shape(folder):
    with pytest.raises(ValueError, match=r"wrong shape: 'b' \(3,\); expected \(4,\)"):
        checkpoint.read_tensors(folder, SHAPES | {"b": (4,)}, optional=["b"])


def test_only_floats_are_weights(tmp_path):
    tensors = {"count": np.zeros(1, np.int64), "wide": np.zeros(1, np.float64)}
    safetensors_numpy.save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"'count' I64; expected .*\n.*'wide' F64"):
        checkpoint.read_tensors(tmp_path, {"count": (1,), "wide": (1,)})


DAMAGE = {
    "empty": lambda content: b"",
    "shorter_than_a_length": lambda content: content[:5],
    "cut_in_the_header": lambda content: content[:40],
    "cut_in_the_last_tensor": lambda content: content[:-1],
    "trailing_garbage": lambda content: content + b"x",
    "header_longer_than_the_file": lambda c: struct.pack("<Q", len(c)) + c[8:],
    "huge_header": lambda c: struct.pack("<Q", 2**63) + c[8:],
    "header_of_no_bytes": lambda c: struct.pack("<Q", 0) + c[8:],
    "not_an_object": lambda c: join([1, 2], b""),
    "pickle": lambda content: PICKLE,
    "pickle_of_a_length": lambda content: struct.pack("<Q", 20) + PICKLE,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_failure_21_a_damaged_file_is_refused(folder, damage):
    path = folder / "model.safetensors"
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    with pytest.raises(ValueError, match="model.safetensors.*never read"):
        checkpoint.read_tensors(folder, SHAPES)


def test_failure_21_a_flipped_bit_of_any_byte_of_the_header_is_seen(folder):
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    for place in range(len(content) - len(split(path)[1])):
        content[place] ^= 1 << place % 8
        path.write_bytes(content)
        with pytest.raises(ValueError, match="`checkpoint.read_tensors`: "):
            checkpoint.read_tensors(folder, SHAPES)
        content[place] ^= 1 << place % 8


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [2, 4]},
        {"shape": [2**62, 3]},
        {"shape": [2**32, 2**32]},
        {"shape": [-2, -3]},
        {"dtype": "F16"},
        {"dtype": "object"},
        {"data_offsets": [0, 2**40]},
        {"data_offsets": [24, 0]},
        {"data_offsets": [4, 28]},
    ],
    ids=str,
)
def test_failure_21_a_header_that_does_not_fit_the_file_is_refused(folder, change):
    path = folder / "model.safetensors"
    header, rest = split(path)
    header["a.weight"] |= change
    path.write_bytes(join(header, rest))
    with pytest.raises(ValueError, match="model.safetensors is damaged"):
        checkpoint.read_tensors(folder, SHAPES)


def test_failure_21_a_sparse_file_takes_no_memory_to_refuse(folder):
    path = folder / "model.safetensors"
    with path.open("r+b") as file:
        file.truncate(1 << 40)
    with pytest.raises(ValueError, match="is damaged"):
        checkpoint.read_tensors(folder, SHAPES)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="model.safetensors"):
        checkpoint.read_tensors(tmp_path, {})
    with pytest.raises(FileNotFoundError, match="config.json"):
        checkpoint.read_config(tmp_path)


def test_a_config_is_read(tmp_path):
    (tmp_path / "config.json").write_text('{"depths": [1, 2], "name": "é"}')
    config = checkpoint.read_config(tmp_path, name="é", other=3)
    assert config == {"depths": [1, 2], "name": "é"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff\xfe\xfd", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[1]", "holds a list"),
        (b'{"act": "gelu"}', "has act 'gelu'; only 'relu' is supported"),
        (b" " * (1 << 20) + b"{}", "has 1048578 bytes"),
    ],
    ids=["empty", "cut", "binary", "deep", "list", "other_setting", "large"],
)
def test_a_config_that_is_none_is_refused(tmp_path, content, message):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=f"config.json.*{message}"):
        checkpoint.read_config(tmp_path, act="relu")


def test_classes_are_counted_by_their_names():
    assert checkpoint.num_labels({"id2label": {"0": "a", "1": "b", "2": "c"}}) == 3
    assert checkpoint.num_labels({"num_labels": 5}) == 5
    assert checkpoint.num_labels({}) == 2


def test_pytorch_variables_are_turned_to_flax_ones(tmp_path):
    shapes = {
        "params": {
            "conv": {"kernel": (3, 5, 2, 4), "bias": (4,)},
            "norm": {"scale": (4,), "bias": (4,)},
            "dense": {"kernel": (2, 4)},
        },
        "batch_stats": {"norm": {"mean": (4,), "var": (4,)}},
    }
    specs = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, np.float32),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )
    rng = np.random.default_rng(0)
    flax = jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32), specs)
    params, stats = flax["params"], flax["batch_stats"]
    tensors = {
        "net.conv.weight": params["conv"]["kernel"].transpose(3, 2, 0, 1),
        "net.conv.bias": params["conv"]["bias"],
        "net.norm.weight": params["norm"]["scale"],
        "net.norm.bias": params["norm"]["bias"],
        "net.norm.running_mean": stats["norm"]["mean"],
        "net.norm.running_var": stats["norm"]["var"],
        "net.norm.num_batches_tracked": np.array(7, np.int64),
        "net.dense.weight": params["dense"]["kernel"].T,
    }
    safetensors_numpy.save_file(
        {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()},
        tmp_path / "model.safetensors",
    )
    found = checkpoint.read_variables(
        tmp_path, specs, lambda path: ".".join(("net", *path))
    )
    jax.tree.map(np.testing.assert_array_equal, found, flax)
