from pathlib import Path
from typing import Any

import jsonargparse
import pytest
import yaml

from organseg.cli.configs import MAX_INCLUDES, expand, load_config, merge
from organseg.cli.modules import trust
from organseg.errors import UsageError
from organseg.methods import TransformerModule

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture
def write(tmp_path):
    def file(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return file


def config_of(words: list[str]) -> dict:
    """The one merged config of an expanded command line."""
    (text,) = [word for word in words if word.startswith("--config=")]
    return yaml.safe_load(text.removeprefix("--config="))


def test_includes_are_relative_to_the_file_that_says_so_and_later_ones_win(write, tmp_path, monkeypatch):
    write("parts/deep/base.yaml", "a: {x: 1, y: 1, z: 1}\nlist: [1, 2]")
    write("parts/one.yaml", "include: [deep/base.yaml]\na: {y: 2, z: 2}")
    write("two.yaml", "a: {z: 3}\nlist: [3]")
    main = write("experiments/main.yaml", "include: [../parts/one.yaml, ../two.yaml]\nb: 4")
    monkeypatch.chdir("/")
    assert load_config(main) == {"a": {"x": 1, "y": 2, "z": 3}, "list": [3], "b": 4}


def test_the_file_itself_wins_over_what_it_includes(write):
    write("part.yaml", "a: 1\nb: 1")
    assert load_config(write("main.yaml", "a: 2\ninclude: [part.yaml]")) == {"a": 2, "b": 1}


def test_a_circle_is_refused(write):
    write("a.yaml", "include: [b.yaml]")
    write("b.yaml", "include: [a.yaml]")
    with pytest.raises(UsageError, match="does one include itself"):
        load_config(write("main.yaml", "include: [a.yaml]"))


def test_as_many_levels_as_promised(write):
    for level in range(MAX_INCLUDES + 1):
        write(f"{level}.yaml", f"include: [{level + 1}.yaml]\nv{level}: {level}")
    last = write(f"{MAX_INCLUDES + 1}.yaml", "end: true")
    with pytest.raises(UsageError, match="nested deeper"):
        load_config(last.parent / "0.yaml")
    assert load_config(last.parent / "1.yaml")["end"] is True


@pytest.mark.parametrize("include", ["part.yaml", "[1]", "{a: b}", "[[part.yaml]]", "null"])
def test_include_is_a_list_of_paths(write, include):
    with pytest.raises(UsageError, match="include: expected a list of paths"):
        load_config(write("main.yaml", f"include: {include}"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("include: [gone.yaml]", r"gone\.yaml: no such file"),
        ("- a", "expected keys and values"),
        ("", "expected keys and values"),
        ("a: !!python/name:os.system", r"main\.yaml: not plain YAML"),
        ("a: 1\na: 2", "duplicate key"),
    ],
)
def test_what_is_no_config(write, text, message):
    with pytest.raises(UsageError, match=message):
        load_config(write("main.yaml", text))


def test_merge_does_not_change_its_arguments():
    base, over = {"a": {"x": 1}, "b": 1}, {"a": {"y": 2}}
    assert merge(base, over) == {"a": {"x": 1, "y": 2}, "b": 1}
    assert (base, over) == ({"a": {"x": 1}, "b": 1}, {"a": {"y": 2}})


@pytest.mark.parametrize(
    ("base", "over", "expected"),
    [
        # The same class, or none said: options add up.
        ({"class_path": "A", "init_args": {"x": 1}}, {"init_args": {"y": 2}},
         {"class_path": "A", "init_args": {"x": 1, "y": 2}}),
        ({"class_path": "A", "init_args": {"x": 1}}, {"class_path": "A", "init_args": {"y": 2}},
         {"class_path": "A", "init_args": {"x": 1, "y": 2}}),
        # Options first, the class later, as network and method do it.
        ({"init_args": {"x": 1}}, {"class_path": "A"}, {"class_path": "A", "init_args": {"x": 1}}),
        # Another class: the first one's options are not its own.
        ({"class_path": "A", "init_args": {"x": 1}}, {"class_path": "B"}, {"class_path": "B"}),
        ({"class_path": "A", "init_args": {"x": 1}}, {"class_path": "B", "init_args": {"y": 2}},
         {"class_path": "B", "init_args": {"y": 2}}),
        ({"a": {"x": 1}}, {"a": None}, {"a": None}),
        ({"a": None}, {"a": {"x": 1}}, {"a": {"x": 1}}),
        ({"a": 1}, {"a": {"x": 1}}, {"a": {"x": 1}}),
    ],
)  # fmt: skip
def test_merge_by_hand(base, over, expected):
    assert merge(base, over) == expected
    assert merge({"deep": {"er": base}}, {"deep": {"er": over}}) == {"deep": {"er": expected}}


def test_another_class_inside_a_class_drops_only_its_own_options():
    base = {"class_path": "M", "init_args": {"lr": 1, "optimizer": {"class_path": "Adam", "init_args": {"betas": 2}}}}
    over = {"init_args": {"optimizer": {"class_path": "SGD", "init_args": {"momentum": 3}}}}
    assert merge(base, over)["init_args"] == {
        "lr": 1,
        "optimizer": {"class_path": "SGD", "init_args": {"momentum": 3}},
    }


def test_another_backbone_drops_only_its_own_options():
    base = {"heads": 2, "network": {"backbone": "unet", "width": 16, "options": {"norm_after": "convolution"}}}
    for over, options in (
        ({"backbone": "nnunet", "options": {"residual": True}}, {"residual": True}),
        ({"backbone": "unet", "options": {"norm": "instance"}}, {"norm_after": "convolution", "norm": "instance"}),
        ({"options": {"norm": "instance"}}, {"norm_after": "convolution", "norm": "instance"}),
    ):
        merged = merge(base, {"network": over})
        assert merged["heads"] == 2 and merged["network"]["width"] == 16 and merged["network"]["options"] == options
    assert "options" not in merge(base, {"network": {"backbone": "nnunet"}})["network"]


def test_expand_replaces_files_by_one_text_behind_the_command(write):
    one, two = write("one.yaml", "a: {x: 1, y: 1}"), write("two.yaml", "a: {y: 2}\ntext: 'yes'\nnumber: 1e-3")
    words = expand(["fit", "--config", str(one), "--seed", "3", f"--config={two}", "--a.x", "7"])
    assert words[0] == "fit"
    assert words[2:] == ["--seed", "3", "--a.x", "7"]  # what is typed comes later, so it wins
    assert config_of(words) == {"a": {"x": 1, "y": 2}, "text": "yes", "number": "1e-3"}
    assert expand(["fit", "-c", str(one)]) == expand(["fit", f"-c={one}"]) == expand(["fit", "--config", str(one)])


def test_expand_leaves_a_command_without_config_alone():
    assert expand(["fit", "--seed", "3"]) == ["fit", "--seed", "3"]
    assert expand([]) == []


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        (["--model.init_args.network.options.norm=instance"], {"norm": "instance", "norm_after": "convolution"}),
        (["--model.network.options.norm", "instance"], {"norm": "instance", "norm_after": "convolution"}),
        (["--model.init_args.network.options.norm_after=null"], {"norm_after": None}),
        (["--model.init_args.network.options.a.b=1e-3", "--model.network.options.a.c=[1, 2]"],
         {"norm_after": "convolution", "a": {"b": 0.001, "c": [1, 2]}}),
        # What sets all of the mapping still does.
        (["--model.init_args.network.options={a: 1}", "--model.init_args.network.options.b=2"], {"a": 1, "b": 2}),
        (["--model.init_args.network.options.b=2", "--model.init_args.network.options={a: 1}"], {"a": 1}),
        (["--model.init_args.network.options={a: 1}"], {"a": 1}),
        (["--model.init_args.network={width: 4}", "--model.init_args.network.options.b=2"], {"b": 2}),
        (["--model.init_args.network.width=4", "--seed", "3"], {"norm_after": "convolution"}),
        (["--model.init_args.network.init_args.width=32", "--model.init_args.network.options.norm=instance"],
         {"norm_after": "convolution", "norm": "instance"}),
        (["--model.init_args.network.init_args.options.norm=instance"],
         {"norm_after": "convolution", "norm": "instance"}),
        (["--model.init_args.network.backbone=nnunet", "--model.init_args.network.options.residual=true"],
         {"residual": True}),
        (["--model.init_args.network.backbone", "nnunet"], None),
        (["--model.init_args={network: {options: {a: 1}}}", "--model.init_args.network.options.b=2"],
         {"a": 1, "b": 2}),
    ],
)  # fmt: skip
def test_a_key_of_an_inner_mapping_keeps_its_neighbours(typed, expected):
    """What the parser makes of the words: it replaces inner mappings."""
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_argument("--seed", type=int)
    for name in ("out", "trainer", "data"):
        parser.add_argument(f"--{name}", type=Any)
    parser.add_subclass_arguments(TransformerModule, "model")
    words = expand(["fit", "--config", str(CONFIGS / "experiment" / "btcv_100_utransformer.yaml"), *typed])
    trust()
    given = parser.parse_args([*words[1:], "--model.organs=[liver]"])
    assert given.model.init_args.network.get("options") == expected


def test_words_that_are_no_key_of_an_inner_mapping_stay_as_they_are(write):
    text = (
        "model: {class_path: M, init_args: {network: {class_path: N, init_args: {a: {b: 1}}}}}\ncurriculum: {x: {y: 1}}"
    )
    path = str(write("main.yaml", text))
    words = ["--model.init_args.network.init_args.a.c=2", "--model.network.width", "4", "--curriculum.x.z=1", "--model",
             "M", "--trainer.callbacks+=C", "--data.init_args.cache", "a: b: c", "--data.init_args.stage=2026-13-40",
             "--data.init_args.fold"]  # fmt: skip
    assert expand(["fit", "--config", path, *words])[2:] == words
    assert expand(["fit", "--a.init_args.b.c.d=1", "--a.init_args.b.c.e=2"]) == [
        "fit",
        "--a.init_args.b={c: {d: 1}}",
        "--a.init_args.b={c: {d: 1, e: 2}}",
    ]


@pytest.mark.parametrize("words", [["fit", "--config"], ["fit", "--config="]])
def test_a_config_needs_a_file(words):
    with pytest.raises(UsageError, match="--config needs a file"):
        expand(words)


@pytest.mark.parametrize("path", sorted((CONFIGS / "experiment").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_experiments_are_complete_and_named_after_their_run(path):
    config = load_config(path)
    assert config["out"] == f"runs/{path.stem}"
    assert config["model"]["class_path"].startswith("organseg.methods.")
    network = config["model"]["init_args"]["network"]  # TransformerModule takes the options of the one that it has
    assert network.get("class_path", "organseg.networks.UTransformer").startswith("organseg.networks.")
    assert config["trainer"]["max_steps"] > 0
    data = config["data"]["init_args"]
    dataset, share, *_ = path.stem.split("_")
    if dataset == "fusion":  # of several data sets, with all labels that they have
        assert data["label_share"] == 1.0 and data["datasets"][0] == "btcv_few"
        assert data["test_datasets"] == ["btcv_heldout"]
        return
    assert data.get("label_share", 1.0) == int(share) / 100
    if dataset not in ("own", "own3d"):  # a template for the reader's data
        assert data["datasets"] == [dataset.removesuffix("3d")]


def test_another_method_says_which_options_no_longer_hold(write, capsys):
    first = write("one.yaml", "model: {class_path: a.A, init_args: {network: x, lr: 1}}")
    same = write("same.yaml", "model: {class_path: a.A, init_args: {lr: 2}}")
    other = write("two.yaml", "model: {class_path: b.B, init_args: {lr: 3}}")
    assert config_of(expand(["fit", "--config", str(first), "--config", str(same)]))["model"]["init_args"]["lr"] == 2
    assert not capsys.readouterr().err
    found = config_of(expand(["fit", "--config", str(first), "--config", str(other)]))
    assert found["model"]["init_args"] == {"lr": 3}
    assert (
        f"{other} has another model.class_path: network of the configs before it no longer" in capsys.readouterr().err
    )


def test_a_config_of_an_older_run_trains_though_it_names_what_fit_no_longer_takes(write):
    old = write("old.yaml", "ckpt_path: null\nweights_only: null\nseed: 1")
    assert config_of(expand(["fit", "--config", str(old)])) == {"seed": 1}
    assert config_of(expand(["test", "--config", str(old)])) == {"ckpt_path": None, "weights_only": None, "seed": 1}
