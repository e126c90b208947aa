"""A config is a typed value that explains and defends itself."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from backbones import model_names
from configs.base import LOSSES, Config
from training.checkpoint import resume
from training.checkpoint.checkpointer import CheckpointError
from training.help import describe_all, describe_key
from utils.config import ALIASES, load_config, plain_values, save_config
from utils.errors import UserError

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
NO_RUNS = ("__init__", "base", "datasets")
SHIPPED = sorted(p.stem for p in CONFIGS.glob("*.py") if p.stem not in NO_RUNS)


@pytest.fixture
def write_config(tmp_path):
    def write(body: str, name: str = "mine.py") -> Path:
        path = tmp_path / name
        path.write_text(body)
        return path

    return write


SMALL = "from easydict import EasyDict as edict\nconfig = edict(rec='/some/where')\n"


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_config_loads(name):
    overrides = ["rec=/somewhere"] if name in ("demo", "lfw_nano", "lfw_classes") else []
    config = load_config(f"configs/{name}", overrides)
    assert config.output == f"work_dirs/{name}"


def recipe_rows(shared_dir: Path) -> list[dict[str, str]]:
    with (shared_dir / "facts/recipes.csv").open() as file:
        return list(csv.DictReader(file))


def test_the_published_runs_have_their_published_settings(shared_dir):
    defaults = Config()
    rows = recipe_rows(shared_dir)
    assert len(rows) == 42
    for row in rows:
        config = load_config(f"configs/{row.pop('config')}")
        for key, text in row.items():
            if key == "output":
                continue
            if key == "dali_aug":  # it became a set of augmentations
                assert config.augment == (["dali_aug"] if text == "True" else [])
                continue
            value = getattr(config, key)
            if text == "":
                assert value == getattr(defaults, key), (config.output, key)
            elif key == "margin_list":
                assert value == tuple(float(x) for x in text.strip("()").split(","))
            elif key == "val_targets":
                assert value == [x.strip(" '") for x in text.strip("[]").split(",") if x]
            elif isinstance(value, str):
                assert value == text
            elif isinstance(value, bool):
                assert value == (text == "True")
            else:
                assert value == float(text), (config.output, key)


def test_shipped_configs_state_only_their_differences():
    defaults = vars(Config())
    for name in SHIPPED:
        namespace: dict = {}
        exec((CONFIGS / f"{name}.py").read_text(), namespace)
        same = [k for k, v in namespace["config"].items() if k not in ALIASES and defaults[k] == v]
        assert not same, f"configs/{name}.py repeats the default of {same}"


def test_defaults_then_module_then_command_line(write_config):
    path = write_config(SMALL + "config.lr = 0.5\nconfig.batch_size = 7\n")
    config = load_config(path, ["lr=0.25"])
    assert (config.lr, config.batch_size, config.momentum) == (0.25, 7, 0.9)


def test_command_line_words_take_the_fields_type(write_config):
    words = [
        "lr=1",
        "val_targets=[lfw,'agedb_30']",
        "margin_list=(1.0,0.5,0.0)",
        "fp16=true",
        "num_classes=auto",
        "seed=1e3",
        "output=None",
        "notes=a=b",
        "max_steps=5",
        "val_dir='/a b'",
    ]
    config = load_config(write_config(SMALL), words)
    assert config.lr == 1.0
    assert isinstance(config.lr, float)
    assert config.val_targets == ["lfw", "agedb_30"]
    assert config.margin_list == (1.0, 0.5, 0.0)
    assert config.fp16 is True
    assert config.num_classes == "auto"
    assert config.seed == 1000
    assert config.output == "work_dirs/mine"
    assert config.notes == "a=b"
    assert config.max_steps == 5
    assert config.val_dir == "/a b"


def test_an_old_spelling_is_the_same_key(write_config):
    old = write_config(SMALL + "config.head_buffer_mib = 512\n")
    assert load_config(old).head_workspace_mib == 512
    assert load_config(old, ["head_workspace_mib=auto"]).head_workspace_mib == "auto"
    assert load_config(old, ["head_buffer_mib=1024"]).head_workspace_mib == 1024
    both = write_config(SMALL + "config.head_buffer_mib = 512\nconfig.head_workspace_mib = 256\n")
    with pytest.raises(UserError, match="head_buffer_mib and head_workspace_mib: two spellings"):
        load_config(both)
    with pytest.raises(UserError, match="head_workspace_mib and head_buffer_mib: two spellings"):
        load_config(write_config(SMALL), ["head_workspace_mib=6", "head_buffer_mib=5"])
    for wrong in ("0", "1.5", "automatic"):
        with pytest.raises(UserError, match=r'head_workspace_mib=.*at least 1, or "auto"'):
            load_config(write_config(SMALL), [f"head_workspace_mib={wrong}"])


@pytest.mark.parametrize(
    ("old", "key", "value"),
    [
        ("head_device='auto'", "head_offload", False),
        ("head_device='cpu'", "head_offload", True),
        ("zero=False", "zero_stage", 0),
        ("zero=True", "zero_stage", 1),
        ("all_reduce_dtype='fp16'", "grad_reduce_dtype", "fp16"),
        ("sub_centres=2", "sub_centers", 2),
        ("loss='subcentre_arcface'", "loss", "subcenter_arcface"),
    ],
)
def test_an_old_spelling_with_its_old_value_is_the_present_one(write_config, old, key, value):
    small = SMALL + "config.sample_rate = 0.5\n"
    from_file = load_config(write_config(f"{small}config.{old}\n"))
    from_words = load_config(write_config(small), [old.replace("'", "")])
    for config in (from_file, from_words):
        assert getattr(config, key) == value
        assert type(getattr(config, key)) is type(value)


@pytest.mark.parametrize(
    ("old", "message"),
    [
        ("head_device='cuda'", r"head_device='cuda': head_device is head_offload now; known are "),
        ("head_device=True", r"head_device=True: head_device is head_offload now; "),
        ("zero=2", r"zero=2: zero is zero_stage now; known are zero=False \(zero_stage=0\), "),
    ],
)
def test_an_old_key_with_a_value_it_never_had_is_explained(write_config, old, message):
    with pytest.raises(UserError, match=message):
        load_config(write_config(f"{SMALL}config.{old}\n"))


def test_an_old_key_on_the_command_line_with_a_wrong_value_is_explained(write_config):
    with pytest.raises(UserError, match="zero='maybe': zero is zero_stage now"):
        load_config(write_config(SMALL), ["zero=maybe"])
    with pytest.raises(UserError, match="head_device is head_offload now"):
        load_config(write_config(SMALL), ["head_device=gpu"])
    with pytest.raises(UserError, match="zero and zero_stage: two spellings"):
        load_config(write_config(SMALL + "config.zero = True\nconfig.zero_stage = 1\n"))
    with pytest.raises(UserError, match="zero_stage=2: allowed are 0, 1"):
        load_config(write_config(SMALL), ["zero_stage=2"])


def test_all_problems_are_reported_at_once(write_config):
    path = write_config(SMALL + "config.lrr = 1\nconfig.batch_size = 'x'\nconfig.momentum = 2.0\n")
    with pytest.raises(UserError) as error:
        load_config(path, ["sample_rate=1.5", "nonsense", "frequent=0", "optimizer=adam"])
    text = str(error.value)
    for words in (
        "7 problems",
        "unknown key 'lrr'",
        "did you mean lr?",
        "batch_size='x'",
        "momentum=2.0",
        "sample_rate=1.5",
        "'nonsense'",
        "frequent=0",
        "optimizer='adam': allowed are sgd, adamw",
    ):
        assert words in text


@pytest.mark.parametrize(
    ("word", "words"),
    [
        ("lr=fast", "a number of at least 0"),
        ("lr=nan", "finite"),
        ("batch_size=1.5", "a whole number of at least 1"),
        ("batch_size=0", "at least 1"),
        ("fp16=1", "True or False"),
        ("margin_list=(1.0,0.5)", "3 numbers"),
        ("margin_list=(0.0,0.5,0.0)", "m1=0.0"),
        ("margin_list=(1.0,4.0,0.0)", "m2=4.0"),
        ("precision=int8", "allowed are fp32, tf32, bf16, fp16, fp64"),
        ("warmup_epoch=50", "num_epoch"),
        ("ema_decay=1.0", "in [0, 1)"),
        ("layer_decay=0.0", "in (0, 1]"),
        ("freeze_epoch=21", "at most num_epoch=20"),
        ("drop_path_rate=1.0", "in [0, 1), or None"),
        ("mask_ratio=-0.1", "in [0, 1), or None"),
        ("rec=synthetic", 'num_classes="auto"'),
        ("num_classes=many", "whole number"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(write_config, word, words):
    with pytest.raises(UserError) as error:
        load_config(write_config(SMALL), [word])
    assert words in str(error.value)
    assert word.split("=")[0] in str(error.value)


def test_the_file_is_found_with_and_without_py_and_anywhere(write_config, monkeypatch, tmp_path):
    path = write_config(SMALL)
    assert load_config(path) == load_config(path.with_suffix(""))
    monkeypatch.chdir(tmp_path)
    assert load_config("mine").output == "work_dirs/mine"
    assert load_config("configs/ms1mv3_r50").network == "r50"  # from the repository
    with pytest.raises(UserError, match="did you mean configs/ms1mv3_r50"):
        load_config("configs/ms1mv3_r5")


def test_a_module_that_fails_or_defines_nothing_is_named(write_config):
    with pytest.raises(UserError, match="ZeroDivisionError"):
        load_config(write_config("config = 1 / 0\n"))
    with pytest.raises(UserError, match="no `config` found"):
        load_config(write_config("x = 1\n"))


def test_an_unmodified_arcface_torch_config_loads(write_config):
    body = """
from easydict import EasyDict as edict

# make training faster
# our RAM is 256G
# mount -t tmpfs -o size=140G  tmpfs /train_tmp

config = edict()
config.margin_list = (1.0, 0.0, 0.4)
config.network = "r50"
config.resume = False
config.save_all_states = False
config.output = None
config.embedding_size = 512
config.sample_rate = 0.2
config.interclass_filtering_threshold = 0
config.fp16 = True
config.momentum = 0.9
config.weight_decay = 5e-4
config.batch_size = 128
config.optimizer = "sgd"
config.lr = 0.1
config.verbose = 2000
config.frequent = 10
config.dali = False
config.dali_aug = False
config.gradient_acc = 1
config.seed = 2048
config.num_workers = 2
config.using_wandb = False
config.wandb_key = "XXXXXXXXXXXXXXXXXXXXXXXXXXXXXXXX"
config.suffix_run_name = None
config.wandb_entity = "entity"
config.wandb_project = "project"
config.wandb_log_all = True
config.save_artifacts = False
config.wandb_resume = False
config.notes = ""
config.rec = "/train_tmp/WebFace42M"
config.num_classes = 2059906
config.num_image = 42474557
config.num_epoch = 20
config.warmup_epoch = config.num_epoch // 10
config.val_targets = ["lfw", "cfp_fp", "agedb_30"]
"""
    config = load_config(write_config(body))
    assert config.num_classes == 2059906
    assert config.warmup_epoch == 2.0


def test_a_key_in_a_config_is_neither_kept_nor_shown(write_config, tmp_path):
    secret = "wandb_key=verysecret"
    config = load_config(write_config(SMALL + "config.wandb_key = 123456789\n"), [secret])
    save_config(config, tmp_path / "config.json", world_size=2)
    text = (tmp_path / "config.json").read_text()
    assert json.loads(text)["resolved"]["world_size"] == 2
    with pytest.raises(UserError) as error:
        load_config(write_config(SMALL + "config.wandb_key = 123456789\n"), [secret, "lrr=1"])
    for told in (text, repr(config), " ".join(config.unused()), str(error.value)):
        assert "verysecret" not in told
        assert "123456789" not in told


@pytest.mark.parametrize("path", [".", "", "/"])
def test_a_folder_is_no_config(path):
    with pytest.raises(UserError, match="config file"):
        load_config(path)


@pytest.mark.parametrize(
    ("words", "remark"),
    [
        (["wandb_key=x"], r"wandb_key is ignored: .*WANDB_API_KEY"),
        (["static_graph=True"], "static_graph is ignored"),
        (["worker_type=processes"], "worker_type is ignored: threads decode the images"),
        (["dali_aug=True"], r"augment=\[dali_aug\] works without DALI too"),
        (["save_all_states=True"], "checkpoints are always complete"),
        (["static_graph=False", "dali_aug=false", "wandb_key=None", "worker_type=threads"], None),
    ],
)
def test_a_key_without_effect_is_accepted_and_a_copy_still_says_so(write_config, words, remark):
    path = write_config(SMALL)
    config = load_config(path, words)
    assert plain_values(config) == plain_values(load_config(path))
    told = config.replace(lr=0.5).unused()
    assert len(told) == (remark is not None)
    assert remark is None or re.match(f".*{remark}", told[0])


def test_dali_aug_is_its_augmentations_where_dali_reads_the_images(write_config):
    path = write_config(SMALL + "config.dali = True\nconfig.dali_aug = True\n")
    assert load_config(path).augment == ["dali_aug"]
    assert load_config(path, ["augment=[adaface]"]).augment == ["dali_aug", "adaface"]
    assert load_config(path, ["augment=[dali_aug]"]).augment == ["dali_aug"]
    assert load_config(path, ["dali=False"]).augment == []
    assert load_config(path, ["dali_aug=False"]).augment == []
    with pytest.raises(UserError, match="dali_aug='maybe': allowed is True or False"):
        load_config(path, ["dali_aug=maybe"])


def test_a_change_is_checked_as_well(write_config):
    config = load_config(write_config(SMALL))
    assert config.replace(batch_size=7).batch_size == 7
    assert config.batch_size == 128
    for change in ({"batch_size": 0}, {"lrr": 1}, {"loss": "arcfase"}):
        with pytest.raises(ValidationError, match=next(iter(change))):
            config.replace(**change)
    with pytest.raises(ValidationError, match="lr"):
        config.lr = -1.0


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("batch_size = True", "batch_size=True: allowed is a whole number of at least 1"),
        ("parallel_dim = False", "parallel_dim=False: allowed are 0, 1, -1, None"),
        ("zero_stage = True", "zero_stage=True: allowed are 0, 1"),
        ("lr = '0.1'", "lr='0.1': allowed is a number of at least 0"),
        ("fp16 = 1", "fp16=1: allowed is True or False"),
        ("rec = {'a', 'b'}", "allowed is text, or a list of texts, or None"),  # without order
        ("rec = ['a', 1]", r"rec=\['a', 1\]: allowed is text, or a list of texts"),
        ("margin_list = {1.0, 0.5, 0.0}", "is 3 numbers: m1 a number above 0; m2 "),
        ("margin_list = (1.0, 4.0, 0.0)", r"margin_list m2=4.0: allowed is a number in \[0, pi\)"),
        ("num_classes = [1.0, 2.0]", 'allowed is a whole number of at least 1, or "auto"'),
        ("seed = 2**63", r"allowed is a whole number in \[0, 2\*\*63\)"),
        ("lr = float('inf')", "lr=inf: allowed is a finite number of at least 0"),
        ("lr = 10**400", r"lr=1000.*0\.\.\.: allowed is a finite number of at least 0"),
        ("lr = 10**5000", "lr=<int: ValueError>: allowed is a finite number"),
        ("lr = __import__('numpy').True_", "lr=np.True_: allowed is a number"),
        ("lr = __import__('torch').tensor(0.1)", r"lr=tensor\(0.1000\): allowed is a number"),
        ("lr = __import__('decimal').Decimal('0.1')", r"lr=Decimal\('0.1'\): allowed is"),
        ("zero_stage = __import__('numpy').bool_(True)", "zero_stage=np.True_: allowed are 0, 1"),
        ("seed = 9007199254740994.0", r"seed=9007199254740994.0: allowed is a whole number"),
        ("rec_weights = [1, float('nan')]", "is a list of finite numbers above 0, or None"),
        ("precision = 'FP16'", "allowed are .*; did you mean fp16"),
        ("network = 5", "network=5: allowed is text"),
        ("optimizer = 'adam'", "allowed are sgd, adamw; did you mean adamw"),
        ("model_config = {}", "unknown key 'model_config'"),
    ],
)
def test_a_value_of_another_type_is_refused_not_converted(write_config, line, message):
    with pytest.raises(UserError, match=message) as error:
        load_config(write_config(f"{SMALL}config.{line}\n"))
    assert "1 problem\n" in str(error.value)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["margin_list=(0,4,5)"], ["margin_list m1=0:", "margin_list m2=4:", "margin_list m3=5:"]),
        # No rule judges the default of a key whose value is wrong.
        (["loss=arcfac", "margin=0.3"], ["loss='arcfac':"]),
        (["num_epoch=0", "warmup_epoch=30"], ["num_epoch=0:"]),
        (["sample_rate=2", "head_offload=True"], ["sample_rate=2:"]),
        (["batch_size=abc", "samples_per_class=3"], ["batch_size='abc':"]),
        (["task=clasification", "label_smoothing=0.1"], ["task='clasification':"]),
        (["zero=maybe", "lr=-1"], ["zero='maybe':", "lr=-1:"]),
    ],
)
def test_each_wrong_value_is_reported_and_nothing_that_follows_from_it(
    write_config, words, expected
):
    with pytest.raises(UserError) as error:
        load_config(write_config(SMALL), words)
    found = str(error.value).splitlines()[1:]
    assert len(found) == len(expected)
    for line, start in zip(found, expected, strict=True):
        assert line.startswith(f"  - {start}")


@pytest.mark.parametrize("value", ["np.array([1, 2])", "np.zeros(2)", "object()", "{}"])
def test_a_key_without_effect_may_have_any_value(write_config, value):
    body = f"import numpy as np\n{SMALL}config.static_graph = {value}\nconfig.wandb_key = {value}\n"
    told = load_config(write_config(body)).unused()
    assert [sentence.split()[0] for sentence in told] == ["static_graph", "wandb_key"]


def test_no_hint_leads_to_a_key_without_effect_and_none_shows_a_secret(write_config):
    with pytest.raises(UserError) as error:
        load_config(write_config(SMALL), ["wandb_kye=a", "static=True", "LR=1", "wandb_key:secret"])
    text = str(error.value)
    assert "wandb_key" not in text
    assert "static_graph" not in text
    assert "secret" not in text
    assert "unknown key 'LR': did you mean lr?" in text


def test_near_types_are_taken_for_each_other(write_config):
    lines = ("batch_size = 64.0", "lr = 1", "margin_list = [1, 0.5, 0]", "val_targets = ('lfw',)")
    more = "from pathlib import Path\nconfig.rec = Path('/a')\n"
    config = load_config(write_config(SMALL + "".join(f"config.{x}\n" for x in lines) + more))
    values = (config.batch_size, config.lr, config.margin_list, config.val_targets, config.rec)
    assert values == (64, 1.0, (1.0, 0.5, 0.0), ["lfw"], "/a")
    assert [type(value) for value in values] == [int, float, tuple, list, str]


def test_a_list_of_sets_and_its_options_are_read_from_the_command_line(tmp_path):
    config = tmp_path / "run.py"
    config.write_text("config = dict(rec='/a,b')\n")
    assert load_config(config).rec == "/a,b"
    loaded = load_config(config, ["rec=/data/ms1m,v3"])
    assert loaded.rec == "/data/ms1m,v3"  # a comma in a name is no list
    loaded = load_config(
        config,
        ["rec=[/a,/b]", "rec_weights=[1,2.5]", "exclude=[-,/c.txt]", "augment=[adaface,erase=0.3]"],
    )
    assert loaded.rec == ["/a", "/b"]
    assert loaded.rec_weights == [1.0, 2.5]
    assert loaded.exclude == ["-", "/c.txt"]
    assert loaded.augment == ["adaface", "erase=0.3"]
    assert load_config(config, ["exclude=/c.txt"]).exclude == "/c.txt"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["rec=[]"], "rec is not set"),
        (["rec_weights=[1,2]"], "one number above 0 for each of 1 sets"),
        (["rec=[a,b]", "rec_weights=[1,0]"], "a list of numbers above 0"),
        (["rec=[a,b]", "exclude=c.txt"], "one list for each of 2 sets"),
        (["samples_per_class=3"], "batch_size=128 is no multiple of it"),
        (["samples_per_class=4", "shuffle_block=64"], "choose one"),
        (["shuffle_block=-1"], "at least 0"),
        (["on_bad_record=pass"], "allowed are error, skip"),
    ],
)
def test_impossible_data_options_are_explained(tmp_path, words, message):
    config = tmp_path / "run.py"
    config.write_text("config = dict(rec='x')\n")
    with pytest.raises(UserError, match=message):
        load_config(config, words)


def test_a_margin_list_beside_a_named_loss_is_refused_or_announced(write_config):
    path = write_config(SMALL)
    with pytest.raises(UserError, match="set margin="):
        load_config(path, ["loss=arcface", "margin_list=(1.0,0.3,0.0)"])
    load_config(path, ["loss=arcface", "margin_list=(1.0,0.3,0.0)", "margin=0.3"])
    exchanged = load_config(
        path, ["loss=adaface", "margin_list=(1.0,0.0,0.4)", "elastic_std=0.1", "margin=0.3"]
    )
    assert [sentence.split("=")[0] for sentence in exchanged.unused()] == [
        "margin_list",
        "elastic_std",
    ]
    assert load_config(path, ["margin_list=(1.0,0.0,0.4)"]).unused() == []


def test_help_has_every_key_by_subject_every_network_and_every_loss():
    text = describe_all()
    for key in Config.model_fields:
        assert f"\n  {key} = " in text
        assert Config.model_fields[key].description
    for name in (*model_names(), *LOSSES):
        assert re.search(rf"\b{name}\b", text)
    order = [text.index(f"\n{title}") for title in ("The task", "The backbone", "The head", "Opti")]
    assert order == sorted(order)


def test_help_of_a_key_says_what_it_allows_and_of_an_old_one_what_it_is_now():
    for key in Config.model_fields:
        assert re.match(rf"{key} = .*\n    Allowed (is|are) \S", describe_key(key))
    assert "[0, 1)" in describe_key("momentum")
    assert "vit_t" in describe_key("network")
    assert "cos(theta) - 0.4" in describe_key("loss")
    assert describe_key("zero").startswith("zero is zero_stage now; zero=False is zero_stage=0; ")
    assert "dali_aug=True, with dali=True, is augment=[dali_aug]" in describe_key("dali_aug")
    assert "WANDB_API_KEY" in describe_key("wandb_key=verysecret")
    assert "verysecret" not in describe_key("wandb_key=verysecret")
    with pytest.raises(UserError, match="unknown key 'lrr': did you mean lr"):
        describe_key("lrr")


def test_a_checkpoint_of_an_earlier_version_differs_only_where_its_settings_do(caplog):
    now = plain_values(Config(rec="x", dali=True, augment=["dali_aug"], zero_stage=1))
    gone = ("augment", "head_offload", "zero_stage")
    before = {key: value for key, value in now.items() if key not in gone}
    before |= {"dali_aug": True, "augment": [], "head_device": "auto", "zero": True}
    before |= {"save_all_states": False, "static_graph": True, "worker_type": "processes"}
    data = {"data": {}, "data set": ""}
    resume.check({"config": before, **data}, {"config": now, **data})
    assert caplog.text == ""
    resume.check({"config": {**before, "dali_aug": False}, **data}, {"config": now, **data})
    assert "resuming with another augment: ['dali_aug'], was []" in caplog.text
    with pytest.raises(CheckpointError, match="seed was 1, is 2048"):
        resume.check({"config": {**before, "seed": 1}, **data}, {"config": now, **data})
