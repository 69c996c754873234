"""A model behaves as a torch module: copies, files, compilers, wrappers, edits of its weights."""

import copy
import io
import pickle

import pytest
import torch
from every_model import FORMS, make_form, make_raw

import sae_fast
from sae_fast.autoencoder import SparseAutoencoder

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
]


def test_properties_name_device_dtype_and_sizes():
    sae = make_form("topk")
    assert (sae.device, sae.dtype) == (torch.device("cpu"), torch.float32)
    assert (sae.d_in, sae.d_sae, sae.k) == (12, 40, 5)
    assert sae.cfg is sae.config
    assert make_form("relu").k is None


class TestPretrained:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16", "torch.bfloat16"])
    def test_dtype_is_given_by_name_or_as_torch_has_it(self, tmp_path, dtype):
        sae = make_form("topk")
        sae.save(tmp_path)
        loaded = SparseAutoencoder.from_pretrained(tmp_path, "cpu", dtype=dtype)
        assert loaded.dtype == torch.bfloat16
        x = make_raw(sae, 3)
        assert torch.equal(loaded(x), sae.bfloat16()(x))

    @pytest.mark.parametrize("dtype", [torch.int8, "float8", "int64"])
    def test_dtype_that_parameters_cannot_have_is_refused(self, tmp_path, dtype):
        make_form("topk").save(tmp_path)
        with pytest.raises(
            ValueError, match="dtype must be one of float32, float64, bfloat16, flo"
        ):
            SparseAutoencoder.from_pretrained(tmp_path, dtype=dtype)


def from_state_dict(sae):
    other = SparseAutoencoder(sae.config)
    other.load_state_dict(sae.state_dict())
    return other


def through_torch_save(sae):
    file = io.BytesIO()
    torch.save(sae, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def through_saved_state(sae):
    file = io.BytesIO()
    torch.save(sae.state_dict(), file)
    file.seek(0)
    other = SparseAutoencoder(sae.config)
    other.load_state_dict(torch.load(file, weights_only=True))
    return other


COPIES = {
    "state_dict": from_state_dict,
    "deepcopy": copy.deepcopy,
    "pickle": lambda sae: pickle.loads(pickle.dumps(sae)),
    "torch.save": through_torch_save,
    "saved state": through_saved_state,
}


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("form", FORMS)
def test_copy_of_a_model_is_the_same_function(form, duplicate):
    sae = make_form(form)
    sae.origin = {"hook": "residual.3"}
    x = make_raw(sae, 2, 3)
    expected = sae(x)
    with sae.kept_copies():
        sae(x)
        other = duplicate(sae)
    assert torch.equal(other(x), expected)
    sae.W_dec.mul_(3)
    assert torch.equal(other(x), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_copy_of_a_model_keeps_its_dtypes(dtype):
    sae = make_form("batch_topk", dtype)
    for other in (copy.deepcopy(sae), pickle.loads(pickle.dumps(sae))):
        for name, tensor in sae.state_dict().items():
            assert other.state_dict()[name].dtype == tensor.dtype


EDITS = {
    "data": lambda W: W.data.mul_(-1.5),
    "data of rows": lambda W: W.data[3].fill_(2.0),
    "data rebound": lambda W: setattr(W, "data", W.data.flip(0).clone()),
    "numpy": lambda W: W.detach().numpy().__imul__(0.5),
    "in place": lambda W: W.requires_grad_(False).mul_(-2.0),
    "detached": lambda W: W.detach().add_(0.3 * W.detach().roll(1, 0)),
    "storage": lambda W: W.untyped_storage().copy_(W.detach().neg().untyped_storage()),
}


class TestEditedWeights:
    """No edit of the weights leaves a stale result behind, however it is made."""

    @pytest.mark.parametrize("precision", ["screened", "fp32", "bf16"])
    @pytest.mark.parametrize("name", ["W_enc", "W_dec"])
    @pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
    def test_edit_is_seen_by_the_next_call(self, edit, name, precision):
        sae = make_form("topk")
        x = make_raw(sae, 2, 30)
        for _ in range(2):
            sae.decode(sae.encode(x, precision=precision))
            with sae.kept_copies():
                sae.decode(sae.encode(x, precision=precision))
            with torch.no_grad():
                edit(sae.get_parameter(name))
            fresh = SparseAutoencoder(sae.config)
            fresh.load_state_dict({k: v.clone() for k, v in sae.state_dict().items()})
            code, expected = (m.encode(x, precision=precision) for m in (sae, fresh))
            assert torch.equal(code.indices, expected.indices)
            assert torch.equal(code.values, expected.values)
            assert torch.equal(sae.decode(code), fresh.decode(expected))

    def test_edit_between_a_training_step_and_a_call_is_seen(self):
        sae = make_form("topk").requires_grad_(True)
        optimizer = torch.optim.SGD(sae.parameters(), lr=1e-3)
        x = make_raw(sae, 30)
        for _ in range(2):
            sae.training_loss(sae.normalize(x)).total.backward()
            optimizer.step()
            sae.W_enc.data.neg_()
            assert torch.equal(sae(x), copy.deepcopy(sae)(x))


class TestCompilers:
    @pytest.mark.slow
    @pytest.mark.parametrize("form", ["topk", "gated"])
    def test_compiled_model_is_the_same_function(self, form):
        torch.compiler.reset()
        sae = make_form(form)
        compiled = torch.compile(sae, backend="eager", fullgraph=True)
        for shape in ((4,), (2, 3)):
            x = make_raw(sae, *shape)
            assert torch.equal(compiled(x), sae(x))

    def test_function_of_an_edited_code_is_compiled(self):
        torch.compiler.reset()
        sae = make_form("topk")

        def steer(x):
            code = sae.encode(x, units="raw")
            edited = code.set([3, 4], 2.0).set(7, code.latent(7) + 1).scaled(5, 0.5)
            return sae.decode(edited.mask(latents=range(30)))

        x = make_raw(sae, 2, 3)
        compiled = torch.compile(steer, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), steer(x))

    @pytest.mark.parametrize("form", ["topk", "relu", "batch_topk"])
    def test_exported_model_is_the_same_function_for_every_number_of_tokens(self, form):
        sae = make_form(form)
        batch = torch.export.Dim("batch", min=2)
        program = torch.export.export(
            sae, (make_raw(sae, 4, 3),), dynamic_shapes=({0: batch, 1: 3, 2: 12},)
        )
        for n_tokens in (2, 7):
            x = make_raw(sae, n_tokens, 3)
            assert torch.equal(program.module()(x), sae(x))

    @pytest.mark.parametrize("form", FORMS)
    def test_vmap_over_a_model_is_a_loop_over_its_calls(self, form):
        sae = make_form(form)
        x = make_raw(sae, 4, 3)
        assert torch.equal(torch.func.vmap(sae)(x), sae(x))
        nested = torch.func.vmap(torch.func.vmap(sae), in_dims=1)
        assert torch.equal(nested(x), sae(x).movedim(1, 0))

    def test_gradients_pass_through_vmap(self):
        sae = make_form("gated").requires_grad_(True)
        x = make_raw(sae, 4, 3).requires_grad_()
        (found,) = torch.autograd.grad(torch.func.vmap(sae)(x).square().sum(), x)
        (expected,) = torch.autograd.grad(sae(x).square().sum(), x)
        assert torch.equal(found, expected)

    def test_functional_call_takes_other_parameters(self):
        sae, other = make_form("topk"), make_form("topk", d_sae=40)
        other.W_dec.mul_(2)
        x = make_raw(sae, 4)
        found = torch.func.functional_call(sae, dict(other.state_dict()), (x,))
        assert torch.equal(found, other(x))


@pytest.fixture(name="one_process")
def make_process_group(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
class TestWrappers:
    def gradients_and_output(self, module, sae, x):
        x_hat = module(x)
        (x_hat - x).square().sum().backward()
        return x_hat.detach()

    def test_model_in_ddp_gives_the_same_result_and_gradients(self):
        sae, alone = (make_form("topk").requires_grad_(True) for _ in range(2))
        x = make_raw(sae, 2, 3)
        wrapped = torch.nn.parallel.DistributedDataParallel(sae)
        found = self.gradients_and_output(wrapped, sae, x)
        assert torch.equal(found, self.gradients_and_output(alone, alone, x))
        for one, other in zip(sae.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad)

    @pytest.mark.filterwarnings("ignore:FSDP2-wrapped module:UserWarning")  # about in-place edits
    def test_model_in_fsdp_gives_the_same_result_and_gradients(self):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        sae, alone = (make_form("topk").requires_grad_(True) for _ in range(2))
        x = make_raw(sae, 2, 3)
        fully_shard(sae, mesh=init_device_mesh("cpu", (1,)))
        found = self.gradients_and_output(sae, sae, x)
        assert torch.equal(found, self.gradients_and_output(alone, alone, x))
        for one, other in zip(sae.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(one.grad.full_tensor(), other.grad)
        for name in ("encode", "decode"):
            register_fsdp_forward_method(sae, name)
        with torch.no_grad():
            assert torch.equal(sae.decode(sae.encode(x)), found)


class TestCompletion:
    def test_package_lists_its_public_names_and_nothing_else(self):
        names = [name for name in dir(sae_fast) if not name.startswith("__")]
        assert names == sorted(name for name in sae_fast.__all__ if not name.startswith("__"))
        for name in names:
            assert getattr(sae_fast, name) is not None

    def test_model_and_code_list_their_public_names(self):
        sae = make_form("topk")
        public = {name for name in dir(sae) if not name.startswith("_")}
        own = {name for name in vars(SparseAutoencoder) if not name.startswith("_")}
        assert own <= public
        assert {"W_enc", "b_dec", "activation_scale", "to", "eval", "state_dict"} <= public
        assert not {"T_destination", "call_super_init", "dump_patches"} & public
        code = sae.encode(make_raw(sae, 2))
        shown = {name for name in dir(code) if not name.startswith("_")}
        assert {"shape", "to", "detach", "cpu", "dense", "to_sparse", "set", "scaled"} <= shown

    def test_ipython_completes_the_public_names(self):
        completer = pytest.importorskip("IPython.core.completer")
        space = {"sae": make_form("topk"), "sae_fast": sae_fast}
        complete = completer.IPCompleter(namespace=space, global_namespace={}, use_jedi=False)

        def completions(text):
            return {match.split(".")[-1] for match in complete.all_completions(text)}

        assert completions("sae.thresh") == {"threshold_of"}
        assert completions("sae.dir") == {"direction"}
        assert completions("sae_fast.S") == {"SAEConfig", "SparseAutoencoder", "Sweep"}
        assert completions("sae_fast.") == {n for n in sae_fast.__all__ if n[0] != "_"}
