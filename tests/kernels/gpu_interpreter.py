"""Pallas's interpreter of GPU kernels, with what it lacks for those of Hopper: it runs them on a CPU.

    with interpreted_gpu():
        jax.jit(f)(...)

Every warpgroup, and every warp of a `warp_map`, is a thread; barriers block, and shared memory is what the kernel makes
of it. Missing in jax 0.11.2 are a store to an accumulator, a product with registers on the left, and named barriers that
single warps join. The decode kernel, which loads and stores by instructions of its own, cannot be interpreted.
"""

import collections
import contextlib
import functools
import inspect
import re
import textwrap
import threading

import jax
import numpy as np

WARP, WARPGROUP = 32, 128
PATIENCE = 120
"""Seconds at a named barrier after which a kernel counts as stuck."""


def why_no_interpreter() -> str | None:
    """Why Hopper kernels cannot be interpreted here; None if they can."""
    if jax.__version_info__[:3] != (0, 11, 2):
        return f"the interpreter is patched for jax 0.11.2, this is {jax.__version__}"
    return None


@contextlib.contextmanager
def interpreted_gpu():
    """Runs Mosaic GPU kernels that are traced inside on the CPU."""
    from jax._src.pallas.mosaic_gpu.interpret import params

    _complete()
    with params.force_gpu_interpret_mode():
        yield


@functools.cache
def _complete() -> None:
    """Adds what is missing, once."""
    from jax._src import callback
    from jax._src import core as jax_core
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, jaxpr_interpret, shared_memory

    def content(key, transforms, thread, info):
        memory = gpu_callbacks._get_shared_memory()
        place = memory.access(key, transforms)
        return memory.get_buffer_content(key, place, thread, logging_info=info)[0], place

    def put(key, place, value, thread, info):
        gpu_callbacks._get_shared_memory().store_buffer_content(key, place, value, thread, logging_info=info)

    @gpu_callbacks.fail_on_exception
    def store(*, token, location, thread, acc, value, source):
        key, info = gpu_callbacks.HostAllocationKey.from_array(acc), shared_memory.GPULoggingInfo(location, thread, source)
        place = gpu_callbacks._get_shared_memory().access(key, ())
        put(key, place, np.asarray(value), thread, info)
        return token

    @gpu_callbacks.fail_on_exception
    def multiply(*, token, location, thread, acc, a, b, transforms, source):
        info = shared_memory.GPULoggingInfo(location, thread, source)
        acc, b = (gpu_callbacks.HostAllocationKey.from_array(key) for key in (acc, b))
        transforms = jax.tree.map(int, gpu_callbacks._remove_noop_transforms(transforms))
        b = content(b, transforms, thread, info)[0].astype(np.float32)
        total, place = content(acc, (), thread, info)
        put(acc, place, total + np.asarray(a, np.float32) @ b, thread, info)
        return token

    def call(self, eqn, token, f, **operands):
        here = {"location": self.mesh_location, "thread": self.thread}
        f = functools.partial(f, source=eqn.source_info)
        return callback.io_callback(f, gpu_callbacks.TOKEN_SHAPE_DTYPE, token=token, **here, **operands)

    def interpret_store(self, eqn, token, operands):
        acc, value = operands()
        return call(self, eqn, token, store, acc=acc, value=value), value

    of_refs = jaxpr_interpret.JaxprInterpreter._interpret_wgmma_ref_p

    def interpret_product(self, eqn, token, operands):
        if not isinstance(eqn.invars[1].aval, jax_core.ShapedArray):
            return of_refs(self, eqn, token, operands)
        acc, a, b, *leaves = operands()
        trees = (eqn.params[f"{name}_transforms_tree"] or jax.tree.structure([]) for name in ("acc", "a", "b"))
        _, _, transforms = jax.tree.unflatten(jax.tree_util.treedef_tuple(tuple(trees)), leaves)
        b, transforms = jaxpr_interpret.resolve_ref(eqn.invars[2].aval, b, transforms)
        return call(self, eqn, token, multiply, acc=acc, a=a, b=b, transforms=transforms), []

    def interpret_bar(self, eqn, token, operands):
        """`Handover`'s own instruction; the dialect knows no other that our kernels write themselves."""
        bar = inspect.getclosurevars(inspect.unwrap(eqn.params["mgpu_fn"])).nonlocals
        how = {"num_threads": bar["threads"], "sync": bar["operation"] == "sync", "source_info": eqn.source_info}
        return gpu_callbacks.call_named_barrier(token, self.mesh_location, self.thread, *operands(), **how), []

    interpreter = jaxpr_interpret.JaxprInterpreter
    interpreter._interpret_store, interpreter._interpret_wgmma_ref_p = interpret_store, interpret_product
    interpreter._interpret_inline_mgpu_p = interpret_bar
    source = textwrap.dedent(inspect.getsource(interpreter.interpret))
    case = re.search(r"^( *)case gpu_primitives.wgmma_accumulator_deref_p:", source, re.MULTILINE)
    more = (
        f"{case[1]}case gpu_primitives.wgmma_accumulator_store_p:\n"
        f"{case[1]}  token, out = self._interpret_store(eqn, token, deferred_invals)\n"
    )
    exec(source[: case.start()] + more + source[case.start() :], vars(jaxpr_interpret))
    interpreter.interpret = jaxpr_interpret.interpret
    gpu_callbacks._named_barrier = _named_barriers(gpu_callbacks, shared_memory.Warp)


def _named_barriers(gpu_callbacks, warp_type):
    """bar.arrive and bar.sync that count threads, by block of a kernel."""
    changed, arrived, passed = threading.Condition(), collections.Counter(), collections.Counter()

    @gpu_callbacks.fail_on_exception
    def bar(token, location, thread, number, *, num_threads, sync, source_info=None):
        kernel = id(gpu_callbacks._get_shared_memory())
        key = kernel, location.cluster_coords, location.block_coords, int(number)
        with changed:
            before = passed[key]
            arrived[key] += WARP if isinstance(thread, warp_type) else WARPGROUP
            if arrived[key] >= num_threads:
                arrived[key] -= num_threads
                passed[key] += 1
                changed.notify_all()
            elif sync and not changed.wait_for(lambda: passed[key] > before, PATIENCE):
                raise TimeoutError(f"named barrier {int(number)}: {arrived[key]} of {num_threads} threads came")
        return token

    return bar
