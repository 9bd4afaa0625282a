"""A Modern Hopfield network (Ramsauer et al., arXiv 2008.02217) as a memory (paper, section 3.1).

    write   the matrix K gains the column k_t, and the matrix V gains the column theta_t / k_t
    read    theta_hat = k (+) V softmax(beta K^T k)

Here (+) joins two vectors, and theta_t / k_t is the paper's notation for the value: theta_t without
its key k_t (see split_key in lora.py). A read is one step of attention, with k as the query. (Where
the paper explains the read, it writes w_q and w_v for the stored keys and values. They are not the
LoRA weights w_q(i) and w_v(i) of lora.py.)

Why does a read return what was written? K^T k compares the key k with each of the T stored keys.
The keys point in very different directions, so only the product of k with itself is large. With
til.py's glyphs, it is 7 to 10, and the product of two different keys is below 1.9. Multiplied by
beta = 25, these products differ by more than 100, and the softmax gives the right value a weight of
1. If beta were much smaller, the weights would be more alike, and a read would return a mixture.
"""
import torch


class Hopfield:
    """The memory. beta is 25, as in the paper (A.2).

    The paper calls beta the softmax temperature, although beta multiplies, and a temperature
    divides.
    """

    def __init__(self, dim=None, beta=25.0):
        # dim, the length of theta, is passed to every memory. This one does not use it.
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
        # beta multiplies the rounding errors of K^T k, too. So these products are in float64.
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
