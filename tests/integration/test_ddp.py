"""Two gloo ranks and one process: the same global batches, the same loss, every case once."""

from pathlib import Path

import pytest
import torch
from toy import TOY, organseg

CONFIGS = Path(__file__).parents[2] / "configs"
CONFIG = CONFIGS / "experiment" / "phantom_30_inerrant0.yaml"
UTRANSFORMER = CONFIGS / "experiment" / "btcv_100_utransformer.yaml"
NNUNET = CONFIGS / "ablation" / "nnunet.yaml"
TWO_RANKS = ("--trainer.devices=2", "--trainer.strategy=ddp")
EXACT = (
    # BatchNorm sees one rank's share; plain SGD, since Adam turns rounding in tiny gradients into whole steps.
    "--model.init_args.network.init_args.norm=instance",
    "--model.init_args.optimizer=torch.optim.SGD",
    "--model.init_args.optimizer.init_args.lr=0.01",
    "--trainer.precision=32-true",
)


def weights(run: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    return state


@pytest.mark.slow
def test_two_ranks_train_as_one_process_does(toy: Path, tmp_path: Path) -> None:
    runs = {1: tmp_path / "one", 2: tmp_path / "two"}
    words = ("fit", "--config", CONFIG, "--data.init_args.cache", toy / "cache", *TOY, *EXACT,
             "--data.init_args.val_share=0.3", "--data.init_args.label_share=0.5")  # fmt: skip
    for ranks, run in runs.items():
        extra = TWO_RANKS if ranks == 2 else ()
        organseg(*words, "--out", run, "--trainer.max_steps=4", "--trainer.val_check_interval=2", *extra)
    standing = "--model.init_args.optimizer.init_args.lr=1e-12"
    organseg(*words, "--out", tmp_path / "begin", "--trainer.max_steps=1", standing)
    one, two, begin = weights(runs[1]), weights(runs[2]), weights(tmp_path / "begin")
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-6, msg=name)
    assert max(float((tensor - begin[name]).abs().max()) for name, tensor in one.items()) > 1e-3


@pytest.mark.slow
def test_deep_supervision_and_attention_on_two_ranks(toy: Path, tmp_path: Path) -> None:
    """nnU-Net's logits of several levels, each normalised over the ranks, are those of one process."""
    options = ("--config", UTRANSFORMER, "--config", NNUNET, "--data.init_args.cache", toy / "cache", *TOY,
               "--model.init_args.heads=2", "--trainer.max_steps=2", *EXACT[1:])  # fmt: skip
    runs = {1: tmp_path / "one", 2: tmp_path / "two"}
    for ranks, run in runs.items():
        # Without the cross-attention's BatchNorm, whose statistics are of one rank's share.
        organseg("fit", *options, "--out", run, "--model.init_args.mhca=false", *(TWO_RANKS if ranks == 2 else ()))
    one, two = weights(runs[1]), weights(runs[2])
    assert sum("coarse_heads" in name for name in one) == 4 and sum(".bottom." in name for name in one) == 8
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-6, msg=name)
    organseg("fit", *options, "--out", tmp_path / "whole", *TWO_RANKS)
    whole = weights(tmp_path / "whole")
    assert all(tensor.isfinite().all() for tensor in whole.values())
    assert any("gates" in name for name in whole)


@pytest.mark.slow
def test_a_batch_that_ranks_cannot_share_is_refused(toy: Path, tmp_path: Path) -> None:
    done = organseg("fit", "--config", CONFIG, "--data.init_args.cache", toy / "cache", "--out", tmp_path / "run",
                    *TOY, "--data.init_args.batch_size=3", "--trainer.max_steps=2", *TWO_RANKS, check=None)  # fmt: skip
    assert done.returncode != 0
    assert "batch_size 3 cannot be shared equally by 2 ranks" in done.stderr
