"""Modern Hopfield network (Ramsauer et al., arXiv 2008.02217) as a memory (paper, section 3.1).

    write   K and V gain the columns k_t and theta_t / k_t          / takes k_t away from theta_t
    read    theta_hat = k (+) V softmax(beta K^T k)                 (+) joins two vectors

A large beta makes the softmax one-hot: a read returns the value whose key has the largest product with k.
A small beta blends everything that was written.
"""
import torch


class Hopfield:
    """The memory; beta is the inverse temperature of the softmax, 25 in the paper (A.2)."""

    def __init__(self, beta=25.0):
        self.beta = float(beta)
        self.K = self.V = None                                      # (|k|, T) and (P - |k|, T) after T writes

    def write(self, key, value):
        """Stores a key k_t (|k|,) and its value theta_t / k_t (P - |k|,)."""
        if self.K is None:
            self.K, self.V = key[:, None], value[:, None]
        else:
            self.K = torch.cat([self.K, key[:, None]], dim=1)
            self.V = torch.cat([self.V, value[:, None]], dim=1)

    def attention(self, key):
        """softmax(beta K^T k): (T,) for a key (|k|,), (n, T) for keys (n, |k|). ValueError if K is empty."""
        if self.K is None:
            raise ValueError("the memory is empty: write to it first")
        return torch.softmax(self.beta * (key.double() @ self.K.double()), dim=-1)

    def read(self, key):
        """theta_hat (P,) for a key (|k|,), or (n, P) for keys (n, |k|), in the dtype of the key."""
        # In float64, because a GPU may round float32 products (TF32). Then a read would not be exact.
        value = self.attention(key) @ self.V.T.double()             # V softmax(beta K^T k)
        return torch.cat([key, value.to(key.dtype)], dim=-1)        # k (+) value

    def state_dict(self):
        """Everything stored, as tensors."""
        return {"K": self.K, "V": self.V}

    def load_state_dict(self, state):
        """Restores what `state_dict` returned; beta stays as it is."""
        self.K, self.V = state["K"], state["V"]

    @property
    def nbytes(self):
        """Size of K and V in bytes."""
        return 0 if self.K is None else self.K.nbytes + self.V.nbytes
