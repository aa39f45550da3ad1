import re
from dataclasses import replace
from pathlib import Path

from organseg.cli.configs import load_config, merge
from organseg.metrics import conventions, write_case_table
from organseg.metrics.evaluate import UNKNOWN, OrganScore
from organseg.metrics.summary import CaseRow
from organseg.report import write_report
from organseg.report.page import OrganTable, Picture, Section, key_options, render_page

CONFIGS = Path(__file__).parents[2] / "configs"
HOSTILE = "<script>alert(1)</script>\"'&"
FOUND = OrganScore("found", 0.8, 9.0, 5.0, 1.0, 0.7, 1.0, 1.0)


def page_of(run) -> str:
    return (run.path / "report" / "index.html").read_text()


def test_nothing_is_loaded_from_anywhere(reported):
    html = re.sub(r'src="data:image/png;base64,[A-Za-z0-9+/=]+"', "", page_of(reported))
    for word in ("<script", "src=", "href", "url(", "@import", "//", "<iframe", "<link", "<object"):
        assert word not in html
    assert "default-src 'none'" in html


def test_whatever_comes_from_files_is_text():
    rows = [CaseRow(HOSTILE, HOSTILE, FOUND, 1.0)]
    config = {"seed": HOSTILE, "data": {"init_args": {"datasets": [HOSTILE], "label_share": HOSTILE}},
              "model": {"class_path": HOSTILE, "init_args": {HOSTILE: HOSTILE}}}  # fmt: skip
    html = render_page(HOSTILE, config, rows, [Picture("a.png", HOSTILE, b"x")], [HOSTILE])
    assert "<script" not in html
    assert html.count("&lt;script&gt;alert(1)") >= 10
    assert "\"'&" not in html


def test_a_hostile_case_of_a_table_is_text_in_the_page_of_a_run(run, capsys):
    write_case_table(run.path / "test" / "cases.csv", [replace(row, case=HOSTILE + "$") for row in run.rows[:4]])
    html = write_report(run.path).read_text()
    assert "<script" not in html
    assert "&lt;script&gt;" in html
    assert "no overlay of median" in capsys.readouterr().err


def test_the_summary_has_counts_and_conventions():
    rows = [
        CaseRow("a", "liver", FOUND, 1.0),
        CaseRow("b", "liver", replace(FOUND, dsc=0.6), 1.0),
        CaseRow("a", "left_kidney", replace(FOUND, outcome="missed", dsc=0.0), 50.0),
        CaseRow("b", "left_kidney", UNKNOWN, 1.0),
    ]
    html = render_page("run", {}, rows, [], [])
    lines = [re.sub(r"<[^>]+>", "|", line) for line in re.findall(r"<tr>(.*?)</tr>", html)]
    cells = {line.strip("|").split("|")[0]: [cell for cell in line.split("|") if cell] for line in lines}
    assert cells["liver"][1:] == ["2", "70.0", "14.1", "70.0", "70.0", "5.0", "1.0", "0", "0", "0", "0"]
    assert cells["left kidney"][1:] == ["1", "0.0", "&ndash;", "0.0", "70.0", "50.0", "50.0", "1", "0", "0", "1"]
    assert cells["mean of organs"][2] == "35.0"
    assert cells["a"][1:] == ["40.0", "80.0", "0.0 ", " missed"]
    assert cells["b"][1:] == ["60.0", "60.0", "&ndash;"]
    assert html.index(">a<") < html.index(">b<"), "the worst case first"
    for line in conventions().splitlines():
        assert line.replace("'", "&#x27;") in html


def test_key_options_tell_what_was_run(reported):
    html = page_of(reported)
    for cell in ("toy_30", "0.3", "0 (of 5, counted from 0)", "PartialLabelModule", "UNet (width 16, depth 5)", "2700",
                 "liver, left_kidney, right_kidney, spleen"):  # fmt: skip
        assert f">{cell}<" in html


def test_experiments_with_attention_can_be_told_apart():
    pages = {}
    for path in sorted((CONFIGS / "experiment").glob("btcv_100_*.yaml")):
        pages[path.stem] = dict(key_options(load_config(path), []))
    for name in ("heads_1", "mhca_level_1", "nnunet", "residual_encoder", "finest_skip", "transformer_block"):
        config = merge(load_config(CONFIGS / "experiment" / "btcv_100_utransformer.yaml"),
                       load_config(CONFIGS / "ablation" / f"{name}.yaml"))  # fmt: skip
        pages[name] = dict(key_options(config, []))
    others = ("btcv_100_inerrant0", "btcv_100_stipple0")  # they differ by their method
    shown = [tuple(page.items()) for name, page in pages.items() if name not in others]
    assert len(set(shown)) == len(shown) > 8
    network = "backbone unet, width 16, depth 5, options (norm_after convolution)"
    assert pages["btcv_100_utransformer"]["network"] == network
    assert pages["heads_1"]["heads"] == "1"
    assert pages["btcv_100_unet"]["mhsa"] == "False" and pages["btcv_100_unet"]["method"] == "TransformerModule"


def test_methods_of_relabelling_and_priors_can_be_told_apart():
    rounds = ("inerrant", "inerrant_judges", "smile", "pseudo_labels", "inerrant_thesis")
    names = (*rounds, "stipple0", "stipple", "inerrant_stipple")
    configs = {name: load_config(CONFIGS / "experiment" / f"btcv_30_{name}.yaml") for name in names}
    for name in ("none", "input", "coordinates", "thesis", "cross_fitted"):
        configs[name] = merge(configs["stipple0"], load_config(CONFIGS / "prior" / f"{name}.yaml"))
    pages = {name: dict(key_options(config, [])) for name, config in configs.items()}
    assert len({tuple(page.items()) for page in pages.values()}) == len(pages)
    assert pages["smile"]["rounds: score"] == "mcp"
    assert "largest_piece False" in pages["smile"]["rounds: selection"]
    assert pages["inerrant_judges"]["rounds: score"] == "CrossFittedConfidence (steps 500)"
    assert "largest_piece True" in pages["inerrant"]["rounds: selection"]
    assert pages["thesis"]["prior: centring"] == "boxes"


def test_an_injected_network_is_shown_with_its_own_mappings():
    options = {"heads": 2, "options": {"norm": "batch", "sizes": [1, 2]}, "act": {"class_path": "torch.nn.ReLU"}}
    network = {"class_path": "organseg.networks.UTransformer", "init_args": options}
    shown = dict(key_options({"model": {"class_path": "M", "init_args": {"network": network, "mhsa": None}}}, []))
    assert shown["network"] == "UTransformer (heads 2, options (norm batch, sizes [1, 2]), act ReLU)"
    assert "mhsa" not in shown and "heads" not in shown


def test_a_config_without_them_is_no_fault():
    assert key_options({"data": None, "model": "x"}, []) == [
        ("organs", "all of the data sets"),
        ("data sets", "all in the cache"),
    ]


def test_notes_and_pictures_are_shown():
    html = render_page("run", {}, [], [Picture("curves.png", "Training", b"png")], ["run `organseg test`"])
    assert '<p class="note">run `organseg test`</p>' in html
    assert 'src="data:image/png;base64,cG5n"' in html
    assert "<h2>Test</h2>" not in html


def test_a_section_has_its_tables_and_pictures_under_their_own_headings():
    table = OrganTable("Round 1", ["organ", "added"], [("left_kidney", "7"), (HOSTILE, HOSTILE)], [HOSTILE])
    section = Section("Relabelling", [table], [Picture("a.png", HOSTILE, b"png", HOSTILE)])
    html = render_page("a", {}, [], [], [], [section])
    assert "<h2>Relabelling</h2>" in html and "<h3>Round 1</h3>" in html
    assert "left kidney</td><td>7</td>" in html
    assert 'src="data:image/png;base64,cG5n"' in html
    assert "<script" not in html and html.count("&lt;script&gt;alert(1)") == 6
    assert "Relabelling" not in render_page("a", {}, [], [], [])
