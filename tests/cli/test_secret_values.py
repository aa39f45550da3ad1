from pathlib import Path

import pytest

from organseg.cli import run
from organseg.cli.configs import load_config
from organseg.cli.secret_values import refuse_secrets
from organseg.errors import UsageError

KEY = "0123456789abcdef0123456789abcdef01234567"
CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize(
    "words",
    [
        [f"--trainer.logger.init_args.api_key={KEY}"],
        ["--trainer.logger.init_args.api_key", "short"],
        ["--x.API-KEY=short"],
        ["--x.password", "short"],
        ["--out", KEY],
        ["--out", f"local-{KEY}"],
        [KEY],
        ["--x", "sk-" + "a1B2" * 10],
        ["--x=wandb_v1_" + "a1B2" * 19],
        ["--x", "https://me:pass@example.org"],
        ["--x", "hf_" + "a" * 34],
        ["--config={logger: {token: short}}", "--token", "short"],
    ],
)
def test_a_key_in_the_command_line_is_refused_and_not_repeated(words):
    with pytest.raises(UsageError, match=r"looks like a key or password.*WANDB_API_KEY") as refused:
        refuse_secrets(words, "command line")
    assert KEY not in str(refused.value) and "short" not in str(refused.value)


@pytest.mark.parametrize(
    "words",
    [
        ["fit", "--config", "configs/experiment/btcv_30_inerrant.yaml", "--out", "runs/a"],
        ["--x.token=null", "--x.keys=4", "--monkey=1", "--tokens", "8"],
        ["--model.init_args.network.keys", "pooled"],
        ["--out", "runs/" + "f" * 64],  # a digest is longer
        ["--out", f"runs/{KEY}"],  # a commit's folder
        ["--ckpt_path", f"snapshots/{KEY}/last.ckpt", "--input", f"{KEY}.nii.gz"],
        ["--out", "runs/sk-net-own_100_inerrant0_fold1"],
        ["--x.class_token", "true"],
        ["--x", "https://example.org:8080/a@b"],
    ],
)
def test_what_is_no_key_passes(words):
    refuse_secrets(words, "command line")


@pytest.mark.parametrize(
    "text", [f"a: {{b: [1, {KEY}]}}", "a: {api_key: short}", "password: 12", "a: {b: 'x hf_%s'}" % ("a" * 34)]
)
def test_a_key_in_a_config_or_in_what_it_includes_is_refused(tmp_path, text):
    (tmp_path / "part.yaml").write_text(text)
    (tmp_path / "main.yaml").write_text("include: [part.yaml]\nout: x")
    with pytest.raises(UsageError, match=r"part\.yaml: \S+: found what looks like a key"):
        load_config(tmp_path / "main.yaml")


def test_shipped_configs_pass():
    for path in CONFIGS.glob("*/*.yaml"):
        load_config(path)


@pytest.mark.parametrize("command", ["fit", "predict", "check"])
def test_the_command_ends_with_2_and_does_not_show_it(command, capsys):
    assert run([command, "--api_key", KEY]) == 2
    shown = capsys.readouterr()
    assert "looks like a key" in shown.err and KEY not in shown.out + shown.err
