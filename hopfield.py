"""Modern Hopfield network (Ramsauer et al., arXiv 2008.02217) as a memory of modulations (paper, section 3.1).

    write:  K and V gain the columns k_t and theta_t / k_t
    read:   theta_hat = k + V softmax(beta K^T k)            (+ is concatenation)

With a large beta the softmax is one-hot and the read is exact; with a small one it blends all that was written.
"""
import torch


class Hopfield:
    """beta: inverse temperature of the softmax; the paper uses 25 throughout."""

    def __init__(self, beta=25.0):
        if not beta >= 0:
            raise ValueError(f"beta is {beta}: it must be a number >= 0")
        self.beta, self.K, self.V = beta, None, None                         # K: (|k|, T), V: (P - |k|, T)

    def write(self, key, value):
        """Stores key k_t (|k|,) with value theta_t / k_t (P - |k|,), both floating point and finite.

        Raises ValueError if not, or if the lengths differ from those stored so far; the memory is then unchanged.
        """
        for name, new, stored in (("key", key, self.K), ("value", value, self.V)):
            if new.ndim != 1 or not new.is_floating_point() or not new.isfinite().all():
                raise ValueError(f"the {name} must be a vector of finite floating point numbers")
            if stored is not None and len(new) != len(stored):
                raise ValueError(f"the {name} has {len(new)} elements, those stored have {len(stored)}")
        # Columns that lie one after the other in memory are quick to add and to pick out: hence the transposes.
        self.K = key[:, None].clone() if self.K is None else torch.cat([self.K.T, key[None]]).T
        self.V = value[:, None].clone() if self.V is None else torch.cat([self.V.T, value[None]]).T

    def attention(self, key):
        """softmax(beta K^T k): the weight of each stored item, (T,) for a key (|k|,), (n, T) for keys (n, |k|).

        In float64: TF32 never touches such a product, whatever torch.backends says, and float32 items stay exact.
        Raises ValueError for an empty memory, and a key of another length or with other than finite floating point numbers.
        """
        if self.K is None:
            raise ValueError("the memory is empty: write to it first")
        if key.shape[-1] != len(self.K):
            raise ValueError(f"the key has {key.shape[-1]} elements, those stored have {len(self.K)}")
        if not key.is_floating_point() or not key.isfinite().all():
            raise ValueError("the key must hold finite floating point numbers")
        return torch.softmax(self.beta * (key.double() @ self.K.double()), dim=-1)

    def read(self, key):
        """theta_hat (P,) for a key (|k|,), or (n, P) for keys (n, |k|), in the dtype of the key."""
        weights = self.attention(key)                                        # (..., T)
        used = (weights > 1e-30).reshape(-1, weights.shape[-1]).any(0)       # columns without weight need no copy in float64
        value = weights[..., used] @ self.V.T[used].double()                 # (..., P - |k|)
        return torch.cat([key, value.to(key.dtype)], dim=-1)                 # (..., P)

    def state_dict(self):
        """Everything stored, as plain tensors; beta is not of it, but the reader's choice."""
        return {"K": self.K, "V": self.V}

    def load_state_dict(self, state):
        """Takes over what state_dict gave. Raises ValueError if K and V do not fit together."""
        K, V = state["K"], state["V"]
        if K is not None or V is not None:
            if not all(torch.is_tensor(x) and x.is_floating_point() and x.ndim == 2 for x in (K, V)) or K.shape[1] != V.shape[1]:
                raise ValueError("K and V must be two matrices with one column for each stored item")
        self.K, self.V = K, V

    @property
    def nbytes(self):
        """Size of K and V in bytes."""
        return 0 if self.K is None else self.K.nbytes + self.V.nbytes
