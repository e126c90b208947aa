"""Plain classification is a task of the same trainer: its last layer, its pictures, its scores.

Whatever is split gives the numbers of the whole; a run of one split goes on with another.
"""

from __future__ import annotations

import json
import unittest.mock
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from arcshard.head.ranking import logit_rank, target_rank
from arcshard.head.row_optimizer import AdamWRows, RowOptimizer, SGDRows
from arcshard.losses import Softmax
from arcshard.parallel import ParallelLinear, Split, clip_grad_norm_, grad_norm
from arcshard.parallel.state_dict import whole_on_first_rank
from backbones import get_model
from backbones.resnet import ResNet
from backbones.weights import (
    ModelMetadata,
    WeightsError,
    load_model,
    read_state_dict,
    save_model,
)
from configs.base import Config
from data.crop import ImageFolder, RandomResizedCrop, center_crop, resize
from data.datasets import DataError
from data.decode import decode_image
from dataset import get_dataloader
from eval import classification
from eval.classification import classify, open_image_folder
from eval.model import open_model
from scripts import hold_out
from tests.conftest import RankFailure, Ranks
from tests.run_helpers import Unhurried, copy_of_run
from torch2onnx import export_onnx
from train_v2 import main, run_on
from training.build import build
from training.classifier import Head, LayerClassifier, SplitClassifier, whole_classifier
from training.optimizer import own_optimizer
from utils.config import load_config
from utils.distributed import DistContext
from utils.errors import UserError

LONG = partial(pytest.param, marks=pytest.mark.slow)  # run by `make test-all` only
DIMS = (None, 0, 1)
CLASSES = ("ant", "bee", "cat", "dog", "emu", "fox", "gnu")

pytestmark = pytest.mark.usefixtures("one_thread")


# --- the network --------------------------------------------------------------------------------


def torchvision_shapes(counts: tuple[int, ...], num_classes: int = 1000) -> dict[str, list[int]]:
    """Names and shapes of torchvision's bottleneck ResNets, from the architecture's rule."""
    shapes: dict[str, list[int]] = {}

    def conv_and_norm(conv: str, norm: str, out: int, inner: int, kernel: int) -> None:
        shapes[f"{conv}.weight"] = [out, inner, kernel, kernel]
        for name in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{norm}.{name}"] = [out]
        shapes[f"{norm}.num_batches_tracked"] = []

    conv_and_norm("conv1", "bn1", 64, 3, 7)
    channels = 64
    for stage, count in enumerate(counts, start=1):
        width = 64 * 2 ** (stage - 1)
        for block in range(count):
            at = f"layer{stage}.{block}"
            conv_and_norm(f"{at}.conv1", f"{at}.bn1", width, channels, 1)
            conv_and_norm(f"{at}.conv2", f"{at}.bn2", width, width, 3)
            conv_and_norm(f"{at}.conv3", f"{at}.bn3", 4 * width, width, 1)
            if block == 0:
                conv_and_norm(f"{at}.downsample.0", f"{at}.downsample.1", 4 * width, channels, 1)
            channels = 4 * width
    return {**shapes, "fc.weight": [num_classes, channels], "fc.bias": [num_classes]}


@pytest.mark.parametrize(
    ("name", "counts", "parameters"),
    [
        ("resnet50", (3, 4, 6, 3), 25_557_032),
        ("resnet101", (3, 4, 23, 3), 44_549_160),
        ("resnet152", (3, 8, 36, 3), 60_192_808),
    ],
)
def test_resnets_have_torchvisions_names_shapes_and_published_size(name, counts, parameters):
    with torch.device("meta"):
        net = get_model(name, num_features=1000, input_size=224)
    assert {k: list(v.shape) for k, v in net.state_dict().items()} == torchvision_shapes(counts)
    assert sum(p.numel() for p in net.parameters()) == parameters


@pytest.mark.parametrize(("name", "size"), [("resnet18", 11_689_512), ("resnet34", 21_797_672)])
def test_resnets_of_basic_blocks_have_their_published_size(name, size):
    with torch.device("meta"):
        net = get_model(name, num_features=1000, input_size=224)
    assert sum(p.numel() for p in net.parameters()) == size


def test_a_published_file_loads_strictly_as_a_classifier_of_imagenet(tmp_path):
    """What torchvision publishes: the plain state dict, nothing said of preprocessing."""
    state = {
        name: torch.zeros(shape, dtype=torch.float32 if shape else torch.int64)
        for name, shape in torchvision_shapes((3, 4, 6, 3)).items()
    }
    path = tmp_path / "resnet50-00000000.pth"
    torch.save(state, path)
    net, metadata = load_model(path, network="resnet50")
    assert (metadata.num_features, metadata.input_size) == (1000, 224)
    assert metadata.mean == (123.675, 116.28, 103.53)
    assert metadata.std == (58.395, 57.12, 57.375)
    assert isinstance(net, ResNet)
    del state["layer4.2.bn3.bias"]
    torch.save(state, path)
    with pytest.raises(WeightsError, match=r"layer4\.2\.bn3\.bias"):
        load_model(path, network="resnet50")


def resnet_by_formula(state: dict[str, Tensor], x: Tensor, expansion: int) -> Tensor:
    """The network from its weights' names, with functions only."""

    def norm(x: Tensor, name: str) -> Tensor:
        mean, var, weight, bias = (
            state[f"{name}.{k}"] for k in ("running_mean", "running_var", "weight", "bias")
        )
        return F.batch_norm(x, mean, var, weight, bias)

    x = F.relu(norm(F.conv2d(x, state["conv1.weight"], stride=2, padding=3), "bn1"))
    x = F.max_pool2d(x, 3, 2, 1)
    for stage in range(1, 5):
        block = 0
        while f"layer{stage}.{block}.conv1.weight" in state:
            at = f"layer{stage}.{block}"
            stride = 2 if stage > 1 and block == 0 else 1
            strides = (stride, 1) if expansion == 1 else (1, stride, 1)
            short = x
            if f"{at}.downsample.0.weight" in state:
                short = F.conv2d(x, state[f"{at}.downsample.0.weight"], stride=stride)
                short = norm(short, f"{at}.downsample.1")
            for number, step in enumerate(strides, start=1):
                weight = state[f"{at}.conv{number}.weight"]
                x = F.conv2d(x, weight, stride=step, padding=weight.shape[-1] // 2)
                x = norm(x, f"{at}.bn{number}")
                x = F.relu(x + short if number == len(strides) else x)
            block += 1
    return F.adaptive_avg_pool2d(x, 1).flatten(1) @ state["fc.weight"].T + state["fc.bias"]


@pytest.mark.parametrize("expansion", [1, 4])
def test_the_network_computes_what_its_architecture_says(expansion):
    torch.manual_seed(0)
    net = ResNet((2, 1, 1, 2), expansion, width=8, num_features=5, input_size=64).double().eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    expected = resnet_by_formula(net.state_dict(), images, expansion)
    torch.testing.assert_close(net(images), expected, rtol=0, atol=1e-10)


def test_without_its_fc_a_resnet_gives_pooled_features_of_one_width_only():
    net = get_model("resnet_nano", num_features=128, input_size=32, with_fc=False)
    assert net(torch.zeros(2, 3, 32, 32)).shape == (2, 128)
    assert not [name for name in net.state_dict() if name.startswith("fc")]
    with pytest.raises(ValueError, match="embedding_size=128"):
        get_model("resnet_nano", num_features=64, input_size=32, with_fc=False)


# --- the last layer -----------------------------------------------------------------------------


def make_head(dim: Any, size: int, num_classes: int, rule: str = "sgd", **options: Any) -> Head:
    def update() -> RowOptimizer:
        return SGDRows(0.9, 1e-2) if rule == "sgd" else AdamWRows(weight_decay=1e-2)

    if dim == "PartialFC":
        return SplitClassifier(
            Softmax(bias=True),
            size,
            num_classes,
            row_optimizer=update(),
            seed=3,
            dtype=torch.float64,
            **options,
        )
    return LayerClassifier(
        size,
        num_classes,
        dim,
        row_optimizer=update(),
        bias_update=update(),
        seed=3,
        dtype=torch.float64,
        **options,
    )


def batches(world_size: int, size: int, num_classes: int) -> list[tuple[Tensor, Tensor]]:
    """One uneven batch per rank."""
    generator = torch.Generator().manual_seed(size)
    return [
        (
            torch.randn(4 + rank, size, generator=generator, dtype=torch.float64),
            torch.randint(num_classes, (4 + rank,), generator=generator),
        )
        for rank in range(world_size)
    ]


def steps_of_head(
    rank: int, world_size: int, dim: Any, size: int, num_classes: int, rule: str, smoothing: float
) -> Any:
    options = {} if dim == "PartialFC" else {"label_smoothing": smoothing}
    head = make_head(dim, size, num_classes, rule, **options)
    first = {name: value.clone() for name, value in whole_classifier(head).items()}
    embeddings, labels = batches(world_size, size, num_classes)[rank]
    seen = []
    for bad in (False, True, False):
        own = embeddings.clone().requires_grad_(True)
        loss = head(own, labels)
        (loss * 8).backward()
        head.step(0.1, torch.tensor(bad), torch.tensor(8.0))
        assert own.grad is not None
        seen.append((loss.item(), own.grad / 8))
    assert head.mean_pairwise_cosine is None  # cosines say nothing of features behind a ReLU
    return first, seen, whole_classifier(head)


@pytest.mark.parametrize(
    ("dim", "smoothing", "rule"),
    [*((dim, 0.0, "sgd") for dim in (*DIMS, "PartialFC")), *((dim, 0.1, "adamw") for dim in DIMS)],
)
@pytest.mark.parametrize("world_size", [1, LONG(2), 3])
def test_every_split_equals_a_dense_layer_in_loss_gradients_and_steps(
    ranks: Ranks, world_size, dim, smoothing, rule
):
    size, num_classes = 5, 7  # neither divides
    found = ranks.run(world_size, steps_of_head, dim, size, num_classes, rule, smoothing)
    first, _, last = found[0]
    layer = nn.Linear(size, num_classes).double()
    layer.load_state_dict(first)
    kind: Any = torch.optim.SGD if rule == "sgd" else torch.optim.AdamW
    options = {"momentum": 0.9} if rule == "sgd" else {}
    optimizer = kind(layer.parameters(), lr=0.1, weight_decay=1e-2, **options)
    parts = batches(world_size, size, num_classes)
    everyone = torch.cat([part for part, _ in parts])
    labels = torch.cat([label for _, label in parts])
    for number, is_bad in enumerate((False, True, False)):
        whole = everyone.clone().requires_grad_(True)
        loss = F.cross_entropy(layer(whole), labels, label_smoothing=smoothing)
        optimizer.zero_grad()
        loss.backward()
        if not is_bad:
            optimizer.step()
        for _, seen, _ in found:
            assert seen[number][0] == pytest.approx(loss.item(), rel=0, abs=1e-12)
        gradient = torch.cat([seen[number][1] for _, seen, _ in found])
        torch.testing.assert_close(gradient, whole.grad, rtol=0, atol=1e-12)
    for name, value in layer.state_dict().items():
        torch.testing.assert_close(last[name], value, rtol=0, atol=1e-12)
    assert all(not collected for _, _, collected in found[1:])  # on the first rank only


def head_with_a_bad_batch(rank: int, world_size: int, dim: Any, wrong: str) -> None:
    head = make_head(dim, 5, 7)
    embeddings, labels = batches(world_size, 5, 7)[rank]
    if rank == 1:
        if wrong == "label":
            labels = labels + 7
        else:
            embeddings = embeddings[:, :3]
    head(embeddings, labels)


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize(("wrong", "words"), [("label", "in [0, 7)"), ("shape", "[b, 5]")])
def test_a_batch_that_does_not_fit_stops_all_ranks(ranks: Ranks, dim, wrong, words):
    with pytest.raises(RankFailure) as failed:
        ranks.run(2, head_with_a_bad_batch, dim, wrong)
    assert set(failed.value.errors) == {0, 1}
    assert words in str(failed.value.errors[1])


def test_arguments_outside_their_domain_are_named():
    with pytest.raises(ValueError, match="dim=2"):
        make_head(2, 5, 7)
    with pytest.raises(ValueError, match=r"label_smoothing=1\.5"):
        make_head(None, 5, 7, label_smoothing=1.5)
    with pytest.raises(ValueError, match="num_classes=0"):
        make_head(None, 5, 0)
    head = make_head(None, 5, 7)
    with pytest.raises(RuntimeError, match="no gradient"):
        head.step(0.1)


# --- where a class stands -----------------------------------------------------------------------


def places_by_sorting(logits: Tensor, labels: Tensor) -> Tensor:
    """Position of each row's own class when classes are sorted by logit, ties by number."""
    places = []
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        by_logit = sorted((-value, number) for number, value in enumerate(row))
        places.append(by_logit.index((-row[label], label)))
    return torch.tensor(places)


@given(
    num_classes=st.integers(1, 9),
    rows=st.integers(1, 6),
    seed=st.integers(0, 10**6),
    world_size=st.integers(1, 4),
)
def test_places_are_those_of_a_sort_with_ties_by_number(num_classes, rows, seed, world_size):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(-2, 3, (rows, num_classes), generator=generator).double()
    labels = torch.randint(num_classes, (rows,), generator=generator)
    expected = places_by_sorting(logits, labels)
    assert torch.equal(logit_rank(logits, labels), expected)
    # the identity as weights, in blocks of one class
    with unittest.mock.patch("arcshard.head.ranking.BLOCK_ELEMENTS", 1):
        weight = torch.eye(num_classes, dtype=torch.float64)
        found = target_rank(logits, labels, weight, None, 0, None)
    assert torch.equal(found, expected)


def test_a_row_without_numbers_is_never_right():
    logits = torch.tensor([[torch.nan, 1.0], [0.0, torch.nan], [torch.inf, 0.0]])
    places = logit_rank(logits, torch.tensor([0, 0, 0]))
    assert places[0] > 1000
    assert places[1:].tolist() == [1, 0]  # NaN stands above
    weight = torch.zeros(2, 3)
    found = target_rank(torch.full((1, 3), torch.nan), torch.tensor([1]), weight, None, 0, None)
    assert found[0] > 1000


def places_of_head(rank: int, world_size: int, dim: Any, num_classes: int) -> Any:
    head = make_head(dim, 5, num_classes)
    generator = torch.Generator().manual_seed(1)
    whole = torch.randint(-1, 2, (num_classes, 5), generator=generator).double()  # many ties
    bias = torch.randint(-1, 2, (num_classes,), generator=generator).double()
    rows = head.class_range
    columns = head.features if isinstance(head, LayerClassifier) else range(5)
    with torch.no_grad():
        head.weight.copy_(whole[rows.start : rows.stop, columns.start : columns.stop])
        assert head.bias is not None
        head.bias.copy_(bias[rows.start : rows.stop])
    embeddings = torch.randint(-1, 2, (3 + rank, 5), generator=generator).double()
    labels = torch.randint(num_classes, (3 + rank,), generator=generator)
    assert isinstance(head, SplitClassifier | LayerClassifier)
    return head.target_rank(embeddings, labels), logit_rank(embeddings @ whole.T + bias, labels)


@pytest.mark.parametrize("dim", [*DIMS, "PartialFC"])
@pytest.mark.parametrize("num_classes", [2, 7])  # 2 on 3 ranks: one has none
@pytest.mark.parametrize("world_size", [1, LONG(2), 3])
def test_places_of_split_heads_are_those_of_dense_logits(
    ranks: Ranks, world_size, dim, num_classes
):
    for found, expected in ranks.run(world_size, places_of_head, dim, num_classes):
        assert torch.equal(found, expected)


# --- pictures -----------------------------------------------------------------------------------


def save(path: Path, picture: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), picture)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/ and val/ of 7 classes, told apart by color; pictures of many sizes."""
    root = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for part, count in (("train", 12), ("val", 4)):
        for number, name in enumerate(CLASSES):
            for k in range(count):
                height, width = generator.integers(30, 60, 2)
                color = np.array([36 * number, 255 - 30 * number, (80 * number) % 256])
                noise = generator.integers(-60, 60, (height, width, 3))
                picture = np.clip(color + noise, 0, 255).astype(np.uint8)
                save(root / part / name / f"{k}.jpg", picture)
    return root


@given(
    height=st.integers(1, 400),
    width=st.integers(1, 400),
    index=st.integers(0, 10**9),
    epoch=st.integers(0, 100),
)
def test_a_box_lies_in_its_picture_and_has_an_allowed_shape(height, width, index, epoch):
    crop = RandomResizedCrop()
    top, left, h, w = box = crop.box(index, 1, epoch, height, width)
    assert 0 <= top <= top + h <= height
    assert 0 <= left <= left + w <= width
    assert h > 0
    assert w > 0
    assert box == crop.box(index, 1, epoch, height, width)
    if min(height, width) > 50:  # where rounding to pixels does not matter
        assert 0.7 < w / h < 1.4


def test_boxes_differ_by_epoch_seed_and_image_and_cover_the_areas():
    crop = RandomResizedCrop((0.1, 0.5))  # up to which every draw fits
    three = range(3)
    boxes = {crop.box(i, s, e, 300, 400) for i in three for s in three for e in three}
    assert len(boxes) == 27
    areas = np.array([np.prod(crop.box(i, 0, 0, 300, 400)[2:]) for i in range(2000)]) / 120_000
    assert 0.09 < areas.min() < 0.11
    assert 0.49 < areas.max() < 0.51
    assert abs(areas.mean() - 0.3) < 0.01


@pytest.mark.parametrize(("height", "width"), [(40, 30), (33, 97), (20, 20), (120, 35)])
def test_pictures_are_resized_as_pillow_does(height, width):
    """Torchvision resizes by Pillow, and published weights were trained on that."""
    image = pytest.importorskip("PIL.Image")
    picture = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    expected = np.asarray(image.fromarray(picture).resize((27, 31), image.Resampling.BILINEAR))
    found = resize(picture, 31, 27)
    assert np.abs(found.astype(int) - expected).max() <= 1


def test_the_middle_is_cut_out_after_the_short_side_is_resized():
    picture = np.zeros((512, 1024, 3), np.uint8)
    picture[:, 400:624] = 255
    cut = center_crop(picture, 224)
    assert cut.shape == (224, 224, 3)
    assert (cut[:, 60:164] == 255).all()  # the stripe is 112 wide now, in the middle
    assert (cut[:, :50] == 0).all()
    assert (cut[:, -50:] == 0).all()
    assert center_crop(picture[:, :100], 32, 40).shape == (32, 32, 3)


def cmyk_of(rgb: np.ndarray) -> bytes:
    image = pytest.importorskip("PIL.Image")
    import io

    file = io.BytesIO()
    image.fromarray(rgb).convert("CMYK").save(file, "JPEG", quality=100, subsampling=0)
    return file.getvalue()


def test_gray_cmyk_and_transparent_pictures_become_rgb():
    rgb = np.zeros((16, 16, 3), np.uint8)
    rgb[...] = (200, 100, 50)
    gray = cv2.imencode(".jpg", np.full((16, 16), 77, np.uint8))[1].tobytes()
    assert (decode_image(gray, "gray") == 77).all()
    found = decode_image(cmyk_of(rgb), "cmyk")
    assert np.abs(found.astype(int) - rgb).max() <= 4
    with_alpha = np.dstack([rgb[:, :, ::-1], np.full((16, 16), 3, np.uint8)])
    assert (decode_image(cv2.imencode(".png", with_alpha)[1].tobytes(), "png") == rgb).all()


def test_a_cut_off_cmyk_picture_is_refused():
    encoded = cmyk_of(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    with pytest.raises(ValueError, match="photo 7"):
        decode_image(encoded[: len(encoded) // 2], "photo 7")


def pictures_of_epoch(folder: Path, world_size: int, **options: Any) -> dict[int, Tensor]:
    found = {}
    for rank in range(world_size):
        loader = get_dataloader(
            folder / "train",
            12 // world_size,
            rank=rank,
            world_size=world_size,
            input_size=32,
            crop=RandomResizedCrop(),
            **options,
        )
        loader.set_epoch(1)
        for step, batch in enumerate(loader):
            for index, image in zip(loader.indices(1, step), batch.images, strict=True):
                found[int(index)] = image.clone()
    return found


@pytest.mark.parametrize(
    ("world_size", "options"),
    [(2, {}), (3, {"num_workers": 0}), (1, {"shuffle": False})],
)
def test_ranks_workers_and_order_do_not_change_a_picture(folder, world_size, options):
    expected = pictures_of_epoch(folder, 1)
    found = pictures_of_epoch(folder, world_size, **options)
    assert len(found) == len(expected) == 84
    assert all(torch.equal(found[index], image) for index, image in expected.items())
    changed = pictures_of_epoch(folder, 1, augment=["photometric=1"], seed=2048)
    assert any(not torch.equal(changed[index], image) for index, image in expected.items())


def test_labels_of_val_follow_the_names_of_train(folder, tmp_path):
    for name in ("dog", "ant"):
        save(tmp_path / "val" / name / "0.png", np.zeros((9, 9, 3), np.uint8))
    (tmp_path / "train").symlink_to(folder / "train")
    assert open_image_folder(tmp_path, 32).labels.tolist() == [0, 3]
    save(tmp_path / "val" / "yak" / "0.png", np.zeros((9, 9, 3), np.uint8))
    with pytest.raises(DataError, match=r"1 of its class folders .* 7 classes .*: yak"):
        open_image_folder(tmp_path, 32)
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "train").symlink_to(folder / "train")
    with pytest.raises(DataError, match="no val/"):
        open_image_folder(tmp_path / "half", 32)


def test_every_tenth_picture_of_a_class_is_held_out_by_links(folder, tmp_path, capsys):
    out = tmp_path / "held"
    assert hold_out.main([str(folder / "train"), str(out), "--every", "5"]) == 0
    assert "70 pictures to train on, 14 held out" in capsys.readouterr().out
    names = {p.name for p in (out / "val" / "bee").iterdir()}
    assert len(names) == 2
    assert not names & {p.name for p in (out / "train" / "bee").iterdir()}
    path = out / "val" / "bee" / min(names)
    assert path.read_bytes() == (folder / "train" / "bee" / path.name).read_bytes()
    assert open_image_folder(out, 32).num_classes == 7
    for words, message in (
        ([str(out)], "already exists"),
        ([str(tmp_path / "n"), "--every", "1"], "2 or more"),
        ([str(tmp_path / "m"), "--every", "99"], "no class has"),
    ):
        assert hold_out.main([str(folder / "train"), *words]) == 2
        assert message in capsys.readouterr().err


# --- scores -------------------------------------------------------------------------------------


def color_logits(images: Tensor) -> Tensor:
    """A classifier made by hand, often wrong: distance to each class's color (BGR), and noise."""
    numbers = torch.arange(7.0)
    colors = torch.stack([(80 * numbers) % 256, 255 - 30 * numbers, 36 * numbers], dim=1)
    noise = torch.sin(images[:, :, :7, 3].sum(dim=1).float())  # [n, 7]
    return -torch.cdist(images.float().mean(dim=(2, 3)), colors) + 60 * noise


def classify_on(rank: int, world_size: int, folder: str, fails: bool) -> Any:
    def embed(images: Tensor) -> Tensor:
        if fails and rank == 1:
            raise ValueError("made up")
        return color_logits(images)

    pictures = ImageFolder(Path(folder) / "val", 32)
    return classify(embed, [pictures], rank=rank, world_size=world_size, batch_size=5)


def test_scores_are_the_same_on_any_number_of_ranks(ranks: Ranks, folder):
    pictures = ImageFolder(folder / "val", 32)
    images = np.stack([pictures.pixels(i, pictures.encoded(i)) for i in range(len(pictures))])
    logits = color_logits(torch.from_numpy(images).permute(0, 3, 1, 2))
    top = logits.topk(5).indices == torch.from_numpy(pictures.labels)[:, None]
    expected = {"top1": top[:, 0].double().mean(), "top5": top.any(1).double().mean()}
    assert 0.3 < expected["top1"] < 1
    for world_size in (1, 2, 3):
        for found in ranks.run(world_size, classify_on, str(folder), False):
            assert found["val"] == {**expected, "num_images": 28}


def test_a_rank_that_fails_keeps_nobody_waiting(ranks: Ranks, folder):
    with pytest.raises(RankFailure) as failed:
        ranks.run(3, classify_on, str(folder), True)
    errors = failed.value.errors
    assert str(errors[1]) == "made up"
    assert all("failed on rank 1" in str(errors[rank]) for rank in (0, 2))


# --- runs ---------------------------------------------------------------------------------------


TINY: dict[str, Any] = {
    "task": "classification",
    "network": "resnet_nano",
    "embedding_size": 128,
    "input_size": 32,
    "loss": "softmax",
    "num_epoch": 1,
    "lr": 0.02,
    "frequent": 1,
    "verbose": 0,
    "num_workers": 1,
    "device": "cpu",
    "weight_decay": 1e-4,
    "checkpoint_every": 4,
    "keep_checkpoints": 100,
}
EXACT = {"precision": "fp64", "freeze_batch_norm": True, "lr": 0.1}
UNSAVED = {"keep_checkpoints": 0}


def whole_run(rank: int, world_size: int, folder: str, changes: dict[str, Any]) -> dict[str, Any]:
    """A run in this process: its losses by step, its scores, its model.pt."""
    cfg = Config(**{**TINY, "batch_size": 12 // world_size, "output": folder, **changes})
    assert not cfg.problems()
    Path(folder).mkdir(parents=True, exist_ok=True)
    world = DistContext(rank, rank, world_size, torch.device("cpu"))
    with unittest.mock.patch("training.start.Checkpointer", Unhurried):
        parts = run_on(cfg, world, Path(folder))
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines() if rank == 0 else []
    records = [json.loads(line) for line in lines]
    own = own_optimizer(parts.step.optimizer).state
    return {
        "losses": {r["step"]: r["loss"] for r in records if "loss" in r},
        "scores": [r["eval"]["val"] for r in records if "eval" in r],
        "model": read_state_dict(folder)[0] if rank == 0 else {},
        "num_states": len(own),
        "head": [p.detach().clone() for p in parts.head.parameters()],
    }


def assert_same(one: dict[str, Any], two: dict[str, Any]) -> None:
    assert one["losses"] == two["losses"]
    assert one["scores"] == two["scores"]
    assert one["model"].keys() == two["model"].keys()
    assert all(torch.equal(one["model"][key], two["model"][key]) for key in one["model"])


@pytest.fixture(scope="module")
def alone(ranks: Ranks, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The whole run on one rank, in float64."""
    out = str(tmp_path_factory.mktemp("alone") / "run")
    changes = {"rec": str(folder), **EXACT, **UNSAVED, "parallel_dim": None}
    (run,) = ranks.run(1, whole_run, out, changes)
    assert len(run["losses"]) == 7
    assert run["losses"][7] < run["losses"][1] - 0.05  # it learns
    return run


@pytest.mark.parametrize(
    ("world_size", "changes"),
    [
        LONG(1, {"parallel_dim": 0}),
        *((2 + (dim == 0), {"parallel_dim": dim}) for dim in DIMS),
        LONG(2, {"parallel_dim": -1, "head_update": "autograd"}),
        (2, {"parallel_dim": 0, "batch_size": 3, "gradient_acc": 2}),
        (3, {"parallel_dim": None, "batch_size": 2, "gradient_acc": 2, "zero_stage": 1}),
    ],
)
def test_a_run_gives_the_same_losses_scores_and_model_whatever_is_split(
    ranks: Ranks, folder, tmp_path, alone, world_size, changes
):
    options = {"rec": str(folder), **EXACT, **UNSAVED, **changes}
    run = ranks.run(world_size, whole_run, str(tmp_path), options)[0]
    for step, loss in alone["losses"].items():
        assert run["losses"][step] == pytest.approx(loss, rel=0, abs=1e-9)
    assert run["scores"] == alone["scores"]
    for key, value in alone["model"].items():
        torch.testing.assert_close(run["model"][key], value, rtol=0, atol=1e-9)


def test_smoothed_labels_give_the_same_run_on_every_split(ranks: Ranks, folder, tmp_path):
    runs = [
        ranks.run(
            2,
            whole_run,
            str(tmp_path / str(dim)),
            {"rec": str(folder), **EXACT, **UNSAVED, "parallel_dim": dim, "label_smoothing": 0.1},
        )[0]
        for dim in DIMS
    ]
    for run in runs[1:]:
        for step, loss in runs[0]["losses"].items():
            assert run["losses"][step] == pytest.approx(loss, rel=0, abs=1e-9)


@pytest.mark.parametrize(
    ("world_size", "changes"),
    [
        LONG(1, {"parallel_dim": None, "precision": "fp16", "lr": 0.005}),
        LONG(2, {"parallel_dim": 0, "zero_stage": 1}),
        (2, {"parallel_dim": 1, "optimizer": "adamw", "lr": 1e-3, "zero_stage": 1}),
        LONG(3, {"parallel_dim": None, "optimizer": "adamw", "lr": 1e-3}),
        (3, {"parallel_dim": 1, "label_smoothing": 0.1, "precision": "bf16"}),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    ranks: Ranks, folder, tmp_path, world_size, changes
):
    changes = {"rec": str(folder), "augment": ["photometric"], **changes}
    left_alone = ranks.run(world_size, whole_run, str(tmp_path / "run"), changes)
    resumed = copy_of_run(tmp_path / "run", tmp_path / "resumed", 4)
    again = ranks.run(world_size, whole_run, str(resumed), {**changes, "resume": "auto"})
    assert_same(again[0], left_alone[0])
    for one, two in zip(again, left_alone, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one["head"], two["head"], strict=True))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((3, {"parallel_dim": 1}), (2, {"parallel_dim": None})),
        ((2, {"parallel_dim": None, "zero_stage": 1}), (3, {"parallel_dim": 0, "zero_stage": 1})),
        LONG((3, {"parallel_dim": 0, "zero_stage": 1}), (1, {"parallel_dim": 1})),
        LONG((1, {"parallel_dim": 1}), (2, {"parallel_dim": 0, "zero_stage": 1})),
    ],
    ids=str,
)
def test_a_run_goes_on_with_other_ranks_another_split_and_with_or_without_zero(
    ranks: Ranks, folder, tmp_path, alone, before, after
):
    options = {"rec": str(folder), **EXACT}
    ranks.run(before[0], whole_run, str(tmp_path), {**options, **before[1], "max_steps": 4})
    resumed = {**options, **after[1], "resume": "auto", "keep_checkpoints": 1}
    again = ranks.run(after[0], whole_run, str(tmp_path), resumed)
    for step, loss in alone["losses"].items():
        assert again[0]["losses"][step] == pytest.approx(loss, rel=0, abs=1e-9)
    for key, value in alone["model"].items():
        torch.testing.assert_close(again[0]["model"][key], value, rtol=0, atol=1e-9)


def test_zero_changes_nothing_but_where_the_state_lies(ranks: Ranks, folder, tmp_path):
    options = {"rec": str(folder), **UNSAVED}
    plain = ranks.run(3, whole_run, str(tmp_path / "plain"), options)
    spread = ranks.run(3, whole_run, str(tmp_path / "spread"), {**options, "zero_stage": 1})
    assert_same(spread[0], plain[0])
    assert all(run["num_states"] < plain[0]["num_states"] for run in spread)
    assert sum(run["num_states"] for run in spread) == plain[0]["num_states"]


def weights_after_a_bad_step(rank: int, world_size: int, folder: str, out: str) -> bool:
    options = {"rec": folder, "zero_stage": 1, "output": out, "batch_size": 6}
    parts = build(
        Config(**{**TINY, **options}), DistContext(rank, rank, world_size, torch.device("cpu"))
    )
    parts.step.model.train()
    batch = next(iter(parts.loader))
    with torch.no_grad():
        parts.head.weight[0] = torch.nan
    before = [p.detach().clone() for p in parts.backbone.parameters()]
    outcome = parts.step([batch], 0.1)
    assert bool(outcome.bad)
    after = list(parts.backbone.parameters())
    return all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_with_zero_nothing_moves_in_a_bad_step(ranks: Ranks, folder, tmp_path):
    assert all(ranks.run(2, weights_after_a_bad_step, str(folder), str(tmp_path)))


def test_the_command_gives_what_the_run_reported_and_any_loader_reads_its_model(
    ranks: Ranks, folder, tmp_path, capsys
):
    run = ranks.run(2, whole_run, str(tmp_path / "run"), {"rec": str(folder)})[0]
    out = tmp_path / "scores.json"
    words = ["--model", str(tmp_path / "run"), "--data", str(folder), "--json", str(out)]
    assert classification.main([*words, "--device", "cpu", "--batch-size", "5"]) == 0
    found = json.loads(out.read_text())["val"]
    assert found == run["scores"][-1]
    net = ResNet((1, 1, 1, 1), 1, width=16, num_features=7, input_size=32)
    net.load_state_dict(torch.load(tmp_path / "run" / "model.pt", weights_only=True), strict=True)
    # and as the state dict alone, as others would have saved it
    bare = tmp_path / "bare.pth"
    torch.save(dict(net.state_dict()), bare)
    settings = {**TINY, "rec": str(folder), "output": str(tmp_path / "next"), "batch_size": 12}
    fine_tuned = build(
        Config(**settings, init_backbone=str(bare)), DistContext(0, 0, 1, torch.device("cpu"))
    )
    body = fine_tuned.backbone.state_dict()
    assert all(torch.equal(body[name], net.state_dict()[name]) for name in body)
    more = ["--model", str(bare), "--network", "resnet_nano", "--data", str(folder)]
    code = classification.main([*more, "--device", "cpu"])
    printed = capsys.readouterr()
    assert code == 0, printed.err  # 224 pixels then, torchvision's usual
    assert "224 pixels" in printed.err
    assert "torchvision's usual" in printed.err


def test_the_command_refuses_classes_it_cannot_match(ranks: Ranks, folder, tmp_path, capsys):
    ranks.run(
        1, whole_run, str(tmp_path / "run"), {"rec": str(folder), "num_classes": 9, "max_steps": 1}
    )
    words = ["--model", str(tmp_path / "run"), "--device", "cpu", "--data"]
    assert classification.main([*words, str(folder)]) == 0  # train/ says which is which
    assert classification.main([*words, str(folder / "val")]) == 2
    assert "has 7 class folders, and the model gives 9 numbers" in capsys.readouterr().err


@pytest.mark.parametrize("fold", [False, True])
def test_a_classifier_becomes_an_onnx_file_of_its_logits(tmp_path, fold):
    torch.manual_seed(0)
    net = get_model("resnet_nano", num_features=7, input_size=32).eval()
    metadata = ModelMetadata("resnet_nano", 7, 32, mean=ResNet.MEAN, std=ResNet.STD)
    file = tmp_path / "model.onnx"
    export_onnx(net, metadata, file, fold_normalization=fold)  # compares with PyTorch
    save_model(tmp_path / "model.pt", net, metadata)
    images = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8)
    expected = open_model(tmp_path / "model.pt").embed(images)
    torch.testing.assert_close(open_model(file).embed(images), expected, rtol=1e-4, atol=1e-5)


def test_many_classes_are_measured_on_generated_pictures(ranks: Ranks, tmp_path):
    changes = {"rec": "synthetic", "num_classes": 5003, "num_image": 48, "max_steps": 2}
    run = ranks.run(2, whole_run, str(tmp_path), changes)[0]
    assert len(run["losses"]) == 2
    assert run["scores"] == []
    assert run["model"]["fc.weight"].shape == (5003, 128)


@pytest.mark.parametrize("name", ["imagenet_r50", "imagenet_r50_1m", "imagenet_r50_2m"])
@pytest.mark.parametrize("dim", [None, 0, -1])
def test_the_shipped_configs_allow_every_split(name, dim):
    config = load_config(f"configs/{name}", [f"parallel_dim={dim}"])
    assert (config.network, config.embedding_size, config.input_size) == ("resnet50", 2048, 224)
    assert config.parallel_dim == dim


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"loss": "combined"}, 'loss="softmax"'),
        ({"parallel_dim": 2}, "parallel_dim=2: allowed are 0, 1, -1, None"),
        ({"task": "recognition", "parallel_dim": 0}, "PartialFC splits classes"),
        ({"task": "recognition", "label_smoothing": 0.1}, "only for task"),
        ({"task": "detection"}, "allowed are recognition, classification"),
        ({"rec": ["a", "b"]}, "one folder with train/ and val/"),
        ({"val_targets": ["lfw"]}, "pairs of faces"),
        ({"label_smoothing": 1.0}, "in [0, 1)"),
        ({"crop_area": (0.0, 1.0)}, "least first"),
        ({"crop_area": (0.5, 0.2)}, "least first"),
        ({"sub_centers": 3}, "one row per class"),
        ({"parallel_dim": None, "sample_rate": 0.5}, "need parallel_dim=1"),
        ({"dali": True}, "dali=True"),
    ],
)
def test_impossible_settings_are_explained(changes, words, tmp_path):
    file = tmp_path / "run.py"
    file.write_text(f"config = { {**TINY, 'rec': 'x', **changes}!r}")
    with pytest.raises(UserError) as error:
        load_config(file)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"network": "r_nano"}, "networks that end in a classifier: resnet18"),
        ({"embedding_size": 64}, "embedding_size=128"),
        ({"val_dir": "nowhere"}, "nowhere is not a folder"),
    ],
)
def test_what_cannot_start_says_why(folder, tmp_path, changes, words):
    settings = {**TINY, "rec": str(folder), "output": str(tmp_path), "batch_size": 12}
    cfg = Config(**{**settings, **changes})
    with pytest.raises(UserError, match=words):
        build(cfg, DistContext(0, 0, 1, torch.device("cpu")))


def test_a_folder_without_train_is_bad_input(tmp_path, capsys):
    config = tmp_path / "run.py"
    config.write_text(f"config = dict({TINY!r}, rec={str(tmp_path)!r}, batch_size=4)")
    assert main([str(config), f"output={tmp_path / 'out'}"]) == 2
    assert "has no folder train/ in it" in capsys.readouterr().err


# --- the norm of split gradients, and parts put together ------------------------------------------


class Two(nn.Module):
    def __init__(self, dims: tuple[Any, Any]) -> None:
        super().__init__()
        self.first = ParallelLinear(5, 7, dim=dims[0], gather_output=dims[0] == 1)
        self.second = ParallelLinear(7, 3, dim=dims[1], gather_output=dims[1] == 1)
        self.scale = nn.Parameter(torch.ones(3))
        self.tied = self.scale

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu()) * self.scale


def clipped(rank: int, world_size: int, dims: tuple[Any, Any], max_norm: float) -> Any:
    torch.manual_seed(0)
    model = Two(dims).double()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(6, 5, dtype=torch.float64, generator=generator)
    model(x).square().sum().backward()
    before = grad_norm(model)
    returned = clip_grad_norm_(model, max_norm)
    assert returned == before
    assert model.scale.grad is not None
    return float(before), float(grad_norm(model)), float(model.scale.grad.norm())


@pytest.mark.parametrize("dims", [(1, 0), (0, 1), (None, 1)])
@pytest.mark.parametrize("max_norm", [0.5, 1e6])
@pytest.mark.parametrize("world_size", [1, LONG(2), 3, LONG(4)])
def test_the_norm_of_split_gradients_is_that_of_the_whole_and_clipping_is_torchs(
    ranks: Ranks, world_size, dims, max_norm
):
    torch.manual_seed(0)
    model = Two((None, None)).double()
    generator = torch.Generator().manual_seed(1)
    model(torch.randn(6, 5, dtype=torch.float64, generator=generator)).square().sum().backward()
    norm = float(nn.utils.clip_grad_norm_(model.parameters(), max_norm))
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    after = float(nn.utils.get_total_norm(gradients))
    assert model.scale.grad is not None
    expected = (norm, after, float(model.scale.grad.norm()))
    for found in ranks.run(world_size, clipped, dims, max_norm):
        assert found == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="max_norm=0"):
        clip_grad_norm_(model, 0)


def put_together(rank: int, world_size: int, dim: int, shape: list[int]) -> Tensor | None:
    whole = torch.arange(float(np.prod(shape))).view(shape)
    split = Split(dim, shape[dim], torch.distributed.group.WORLD if world_size > 1 else None)
    with unittest.mock.patch("arcshard.parallel.state_dict.PIECE_BYTES", 40):
        return whole_on_first_rank(split.take(whole), split)


@pytest.mark.parametrize(("dim", "shape"), [(0, [11, 3]), (1, [3, 11]), (0, [2, 3]), (0, [23])])
@pytest.mark.parametrize("world_size", [1, LONG(2), 3, LONG(4)])
def test_parts_are_put_together_piece_by_piece(ranks: Ranks, world_size, dim, shape):
    first, *others = ranks.run(world_size, put_together, dim, shape)
    assert torch.equal(first, torch.arange(float(np.prod(shape))).view(shape))
    assert others == [None] * (world_size - 1)
