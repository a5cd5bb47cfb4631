"""The fast kernels of NVIDIA GPUs, in Triton; `kernels.reference` has the definition of each under the same name.

Importing this package loads nothing; its modules load torch and triton. They take torch tensors on the current CUDA
device, launch on its current stream and never wait for it. What they have in common:

* K and V of a layer are pools [slots, heads, dim], as one tensor or as a `kernels.torch.quantized_pool.QuantizedPool`.
  Position p of a row lies in slot table[row, p // block_tokens] * block_tokens + p % block_tokens, or, if
  `block_tokens` is None, in slot table[row, 0] + p: the row is a run.
* Whatever lies in a pool beyond a row's positions may be anything, NaN included.
* Errors are raised before a launch. They can only see shapes, dtypes and host numbers: values that lie on the device,
  such as lengths and block numbers, are the caller's to get right.
* Nothing is tuned at run time. Each module has a table of tile sizes for compute capability 8.0 and 9.0, and a row's
  result is the same bits in any batch.
"""
