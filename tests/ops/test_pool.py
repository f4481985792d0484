"""Storage is reused when, and only when, nobody looks at it any more."""

import gc
import threading

import torch

from moestro import ops
from moestro.ops import StoragePool


def test_storage_comes_back_when_the_last_tensor_dies():
    pool = StoragePool()
    first = pool.empty((100, 100), torch.float32)
    address = first.data_ptr()
    view = first[3:5]
    del first
    assert pool.empty((100, 100), torch.float32).data_ptr() != address  # the view still looks at it
    del view
    pool.empty((1,), torch.float32)
    leases = [pool.empty((100, 100), torch.float32) for _ in range(2)]
    assert address in {lease.data_ptr() for lease in leases}
    assert leases[0].data_ptr() != leases[1].data_ptr()


def test_a_gradient_is_taken_over_and_its_storage_reused_after_zero_grad(make_case):
    ops.POOL.clear()
    case = make_case(64, 4, dim=64, inner=128, dtype=torch.float32).fresh()

    def step():
        case.run("segments").sum().backward()
        return case.weights.up_EJD.grad.data_ptr()

    def pooled(address):
        return address in {storage.data_ptr() for storage in ops.POOL._storages}

    sizes = []
    for _ in range(4):
        case.weights.up_EJD.grad = None
        assert pooled(step())  # stolen, not copied
        sizes.append(ops.POOL.nbytes())
    assert sizes[1] == sizes[3]  # reused
    kept = case.weights.up_EJD.grad.detach()
    before = kept.clone()
    case.weights.up_EJD.grad = None
    assert step() != kept.data_ptr()  # somebody kept the gradient
    torch.testing.assert_close(kept, before, rtol=0, atol=0)


def test_a_near_size_serves_scratch_but_not_gradients():
    pool = StoragePool()
    large = pool.empty((5000,), torch.float32).data_ptr()
    assert pool.empty((4500,), torch.float32).data_ptr() == large
    exact = pool.empty((4500,), torch.float32, exact=True)
    assert exact.data_ptr() != large
    assert exact.untyped_storage().nbytes() == 18000
    assert pool.empty((1200,), torch.float32).data_ptr() != large  # much smaller: would waste it


def test_idle_storage_never_exceeds_the_peak_in_use():
    pool = StoragePool()
    held = [pool.empty((4096,), torch.float32) for _ in range(4)]
    peak = pool.nbytes()
    del held
    for rows in range(5000, 60000, 5000):
        pool.empty((rows,), torch.float32)
        assert pool.nbytes() <= max(peak, 4 * rows + 4096)
    pool.clear()
    assert pool.nbytes() == 0


def test_steps_of_one_shape_stop_growing(make_case):
    ops.POOL.clear()
    case = make_case(300, 6, 2, dim=32, inner=32, dtype=torch.float32)
    sizes = []
    for _ in range(4):
        case.gradients("segments")
        sizes.append(ops.POOL.nbytes())
    assert sizes[1] == sizes[3]
    gc.collect()
    assert ops.POOL.nbytes(idle=True) == ops.POOL.nbytes()


def test_threads_never_share_a_lease():
    pool = StoragePool()
    failures = []

    def work(value):
        for _ in range(200):
            tensor = pool.empty((2048,), torch.float32).fill_(value)
            if not (tensor == value).all():
                failures.append(value)

    threads = [threading.Thread(target=work, args=(value,)) for value in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
