"""A model returns x_hat alone, which cannot be unpacked like a pair."""

import copy
import io
import pickle

import pytest
import torch
from plain_sae import make_batch, make_sae
from torch import Tensor

from sae_fast.autoencoder.unpacking import refuse_unpacking


@pytest.mark.parametrize("n_tokens", [1, 2, 3])
def test_unpacking_a_reconstruction_is_refused_whatever_its_rows(n_tokens):
    sae = make_sae()
    with pytest.raises(TypeError, match=r"x_hat, code = sae\.forward_with_code"):
        _x_hat, _h = sae(make_batch(sae, n_tokens))


@pytest.mark.parametrize("skip_connection", [False, True])
def test_reconstruction_and_code_are_those_of_encode_and_decode(skip_connection):
    sae = make_sae(transcoder=True, d_out=7, skip_connection=skip_connection)
    x = make_batch(sae, 6).reshape(2, 3, 12)
    x_hat, code = sae.forward_with_code(x)
    assert type(x_hat) is Tensor
    assert torch.equal(x_hat, sae(x))
    assert torch.equal(x_hat, sae.decode(code, x))
    assert torch.equal(code.values, sae.encode(x).values)


def test_what_is_computed_from_a_reconstruction_is_an_ordinary_tensor():
    x_hat = refuse_unpacking(torch.ones(2, 3))
    made = x_hat + 1, x_hat[0], x_hat.detach(), torch.cat([x_hat, x_hat]), x_hat == x_hat
    assert all(type(tensor) is Tensor for tensor in (*made, *x_hat.unbind()))


def test_gradients_pass_through_a_reconstruction():
    sae = make_sae()
    x = make_batch(sae)
    (sae(x) - x).square().sum().backward()
    found = [p.grad for p in sae.parameters()]
    for p in sae.parameters():
        p.grad = None
    (sae.forward_with_code(x)[0] - x).square().sum().backward()
    assert all(map(torch.equal, found, [p.grad for p in sae.parameters()]))


@pytest.mark.parametrize("weights_only", [True, False])
def test_reconstruction_is_saved_as_an_ordinary_tensor(weights_only):
    sae = make_sae()
    x_hat = sae(make_batch(sae))
    file = io.BytesIO()
    torch.save({"x_hat": x_hat}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=weights_only)["x_hat"]
    assert type(loaded) is Tensor
    assert torch.equal(loaded, x_hat)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_reconstruction_is_copied_as_an_ordinary_tensor(duplicate):
    sae = make_sae().requires_grad_(False)
    x_hat = sae(make_batch(sae))
    assert type(duplicate(x_hat)) is Tensor
    assert torch.equal(duplicate(x_hat), x_hat)


def test_reconstruction_shows_and_compares_as_an_ordinary_tensor():
    x = torch.ones(2, 2)
    assert repr(refuse_unpacking(x)) == repr(x)
    assert refuse_unpacking(x).tolist() == x.tolist()
    assert (refuse_unpacking(x).numpy() == x.numpy()).all()
    torch.testing.assert_close(refuse_unpacking(x), x, rtol=0, atol=0)


TRACERS = {
    "compile": lambda f, x: torch.compile(f, backend="eager", fullgraph=True)(x),
    "vmap": lambda f, x: torch.func.vmap(f)(x),
    "jit.trace": lambda f, x: torch.jit.trace(f, x)(x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,))[0],
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit
@pytest.mark.parametrize("trace", TRACERS.values(), ids=TRACERS)
def test_traced_reconstruction_is_an_ordinary_tensor(trace):
    found = trace(lambda x: refuse_unpacking(2 * x), torch.ones(2, 2))
    assert type(found) is Tensor
    assert torch.equal(found, torch.full((2, 2), 2.0))


def test_exported_function_gives_an_ordinary_tensor():
    class Twice(torch.nn.Module):
        def forward(self, x):
            return refuse_unpacking(2 * x)

    program = torch.export.export(Twice(), (torch.ones(2, 2),))
    assert type(program.module()(torch.ones(2, 2))) is Tensor


def test_reconstruction_can_take_the_place_of_a_module_output():
    sae = make_sae().requires_grad_(False)
    net = torch.nn.Sequential(torch.nn.Linear(12, 12), torch.nn.LayerNorm(12))
    expected = net[1](sae.forward_with_code(net[0](make_batch(sae)))[0])
    net[0].register_forward_hook(lambda module, inputs, output: sae(output))
    assert torch.equal(net(make_batch(sae)), expected)


def test_transformers_model_runs_on_reconstructions():
    transformers = pytest.importorskip("transformers")
    sizes = {"n_embd": 12, "n_layer": 2, "n_head": 2, "n_positions": 16, "vocab_size": 30}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()
    sae = make_sae().requires_grad_(False)
    tokens = torch.arange(10)[None]

    def logits(reconstruct):
        def replace(module, inputs, output):
            if isinstance(output, tuple):
                return (reconstruct(output[0]), *output[1:])
            return reconstruct(output)

        hook = model.transformer.h[0].register_forward_hook(replace)
        with torch.no_grad():
            result = model(tokens).logits
        hook.remove()
        return result

    assert torch.equal(logits(sae), logits(lambda x: sae.forward_with_code(x)[0]))
