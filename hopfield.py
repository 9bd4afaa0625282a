"""A Modern Hopfield network (Ramsauer et al., arXiv 2008.02217) as a memory (paper, section 3.1).

    write   the matrix K gains the column k_t, and the matrix V gains the column theta_t / k_t
    read    theta_hat = k (+) V softmax(beta K^T k)

The paper writes theta_t / k_t for "theta_t without its key k_t"; (+) joins two vectors.

Why does a read return what was written? K^T k compares the key k with every stored key. The keys
of two tasks are nearly orthogonal, so only one of these T products is large, and the softmax gives
it a weight of almost 1. With a smaller beta, the weights would be more alike, and a read would
return a mixture of all values.
"""
import torch


class Hopfield:
    """The memory. beta is the inverse temperature of the softmax, 25 in the paper (A.2)."""

    def __init__(self, dim=None, beta=25.0):
        # `dim` is the length of theta. Every memory is told it, but this one need not know it.
        self.beta = beta
        self.keys = []                          # the columns of K, each (|k|,)
        self.values = []                        # the columns of V, each (P - |k|,)

    def write(self, key, value):
        """Stores a key k_t (|k|,) and its value theta_t / k_t (P - |k|,)."""
        self.keys.append(key)
        self.values.append(value)

    def attention(self, key):
        """softmax(beta K^T k): how much a read takes of each stored value. (T,), float64."""
        K = torch.stack(self.keys).T                                # (|k|, T)
        # In float64, because beta multiplies the rounding errors of the product, too.
        return torch.softmax(self.beta * (K.T.double() @ key.double()), dim=0)

    def read(self, key):
        """The key (|k|,) of a task -> theta_hat (P,)."""
        V = torch.stack(self.values).T                              # (P - |k|, T)
        value = V @ self.attention(key).to(V.dtype)                 # (P - |k|,)
        return torch.cat([key, value])

    @property
    def nbytes(self):
        """The size of K and V in bytes."""
        return sum(x.nbytes for x in self.keys + self.values)
