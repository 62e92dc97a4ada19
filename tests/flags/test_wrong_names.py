"""Wrong names of every kind, through the real command line: three lines, exit code 2, the right name first."""

import pytest

from midway.gen.commands.main import started

WRONG = """
train tokenizr -> did you mean 'train tokenizer'?
evalute -> did you mean 'evaluate'?
data chek digits -> did you mean 'data check'?
train tokenizer digits-fqs -> did you mean 'digits-fsq'?
train tokenizer smal -> did you mean 'small'?
train latent digit-dit -> did you mean 'digits-dit'?
train baseline digits-real-nvpp -> did you mean 'digits-realnvp'?
train baseline tar-flw -> did you mean 'tarflow'?
train solver tabel -> did you mean 'table'?
train solver amed-plugin-ipndm -> did you mean 'amed-plugin-ipndm3'?
train tokenizer digits-fsq --stpes 5 -> did you mean '--steps'?
train tokenizer digits-fsq --train.stpes 5 -> did you mean '--train.steps'?
train tokenizer digits-fsq --learning-rate 1 -> did you mean '--lr'?
train tokenizer digits-fsq --batchsize 5 -> did you mean '--batch-size'?
train tokenizer digits-fsq --downsample 4 -> did you mean '--model.downsample'?
train tokenizer digits-fsq --epochs 5 -> did you mean '--steps'?
train latent digits-dit --model.depth 4 -> did you mean '--model.dit.depth'?
train tokenizer digits-fsq --decay cosin -> did you mean 'cosine'?
train tokenizer digits-fsq --precision fp16 -> did you mean 'bf16'?
train tokenizer digits-fsq --optimizer adam -> did you mean 'adamw'?
train tokenizer digits-fsq --resume yes -> did you mean 'auto'?
train tokenizer digits-fsq --quantizer rvq -> did you mean 'residual'?
train tokenizer digits-fsq --quantizer vq-vae -> did you mean 'vq'?
train tokenizer digits-fsq --model.quantizer bsq-vit -> did you mean 'bsq'?
train tokenizer digits-fsq --quantizer.codebok-size 4 -> did you mean '--quantizer.codebook-size'?
train tokenizer digits-fsq --model.network transformer -> did you mean 'vit'?
train tokenizer digits-fsq --loss.pixel l3 -> did you mean 'l1'?
train tokenizer digits-fsq --loss.adversary gan -> did you mean 'hinge'?
train tokenizer digits-fsq --data cifar -> did you mean 'cifar10'?
train tokenizer digits-fsq --data fashion -> did you mean 'fashion_mnist'?
train latent digits-dit --model.schedule ve -> did you mean 'edm'?
train latent digits-dit --model.target vel -> did you mean 'velocity'?
train solver amed --model m --distill.teacher hein -> did you mean 'heun'?
train solver amed --model m --grid karas -> did you mean 'karras'?
prove --solvers dpm++3 -> did you mean 'dpmpp3m'?
prove --solvers euler_a -> did you mean 'ddpm'?
prove --learned amde -> did you mean 'amed'?
evaluate --solver ddim -> did you mean '--solvers'?
evaluate --protocol torch-fidelty -> did you mean 'pytorch-fid'?
check-metric --features inception-v3 --data digits -> did you mean 'inception'?
check-metric --features dino --data digits -> did you mean 'dinov2-vitl14'?
evaluate --images x.npz --data digits --out o --metrics fid -> --features inception
evaluate --images x.npz --data digits --out o --metrics mmd -> did you mean 'kid'?
download-weights incepton -> did you mean 'inception'?
"""


@pytest.mark.parametrize("case", WRONG.strip().splitlines())
def test_a_wrong_name_suggests_the_right_one_first(
    case: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    typed, expected = case.split(" -> ")
    monkeypatch.chdir(tmp_path_factory.getbasetemp())
    with pytest.raises(SystemExit) as ended:
        started(typed.split())
    printed = capsys.readouterr()
    what, why, fix = printed.err.strip().splitlines()[-3:]
    assert ended.value.code == 2 and printed.out == ""
    assert what.startswith("error: ") and why.startswith("  why: ") and fix.startswith("  fix: ")
    assert expected in fix and len(fix.split("choose one of: ")[-1].split(" and ")[0].split(", ")) <= 8, fix
