"""Modern Hopfield network (Ramsauer et al., arXiv 2008.02217) as a memory (paper, section 3.1).

    write   K and V gain the columns k_t and theta_t / k_t, which is theta_t without k_t
    read    theta_hat = k (+) V softmax(beta K^T k), where (+) joins two vectors

If k was written, the keys are orthogonal and beta is far above log(T) / (k^T k), the softmax is
one-hot, and a read returns the value of k. With a small beta, it blends all that was written.
"""
import torch


class Hopfield:
    """The memory; beta is the inverse temperature of the softmax, 25 in A.2 ("temperature").

    `dim`, the length of theta, is not used. Every memory takes it, because some need it.
    """

    def __init__(self, dim=None, beta=25.0):
        self.beta = float(beta)
        self.K = torch.empty(0)                 # (|k|, T) after T writes
        self.V = torch.empty(0)                 # (P - |k|, T)

    def write(self, key, value):
        """Stores a key k_t (|k|,) and its value theta_t / k_t (P - |k|,)."""
        # The first write joins them to nothing: torch.cat passes over the shape (0,), though its
        # dtype counts.
        self.K = torch.cat([self.K, key[:, None]], dim=1)
        self.V = torch.cat([self.V, value[:, None]], dim=1)

    def attention(self, key):
        """softmax(beta K^T k): (T,) for a key (|k|,), (n, T) for keys (n, |k|)."""
        if len(self.V) == 0:
            raise ValueError("the memory is empty: write to it first")
        # In float64, because beta multiplies the rounding error of the product.
        product = key.double() @ self.K.double()
        return torch.softmax(self.beta * product, dim=-1)

    def read(self, key):
        """theta_hat (P,) for a key (|k|,), or (n, P) for keys (n, |k|), in the dtype of the key."""
        value = self.attention(key) @ self.V.T.double()     # V softmax(beta K^T k)
        return torch.cat([key, value.to(key.dtype)], dim=-1)

    @property
    def nbytes(self):
        """Size of K and V in bytes."""
        return self.K.nbytes + self.V.nbytes
