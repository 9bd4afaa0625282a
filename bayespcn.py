"""BayesPCN (Yoo & Wood, NeurIPS 2022, arXiv 2205.09930) as a memory, with one particle.

The idea
    The memory is a stack of four layers that generates theta from the top down: each layer predicts
    the one below it.

                     write                                   read
        x^3   [        ?        ]  searched       [        ?        ]  searched
                       | W_2                                | W_2
        x^2   [        ?        ]  searched       [        ?        ]  searched
                       | W_1                                | W_1
        x^1   [        ?        ]  searched       [        ?        ]  searched
                       | W_0                                | W_0
        x^0   [ key |   value   ]  known          [ key |     ?     ]  the key is known

    A write is given theta, a read is given only the key. Both begin with the same search: which
    hidden layers x^1, x^2, x^3 explain best what is known?
        - A write then changes the weights W, so that these hidden layers explain theta even better.
        - A read then lets x^1 predict the value.
    A read succeeds if its search ends at the hidden layers at which the write has ended.

What is Bayesian about it
    Each prediction is a linear regression. We do not know its weights W_l, and we never fix them.
    We keep a belief about them: a normal distribution, with a mean R_l and a covariance U_l. To
    write is to observe one more example, and Bayes' rule says how an observation changes a belief.
    So a write needs no learning rate. And old memories survive: in the directions in which the
    memory has seen examples, the belief is firm, and a write changes it little.

The model
    Regression l predicts x^l from z = GELU(x^(l+1)). All of these are row vectors:

        x^l  ~  N(z W_l, s2 I)      where  W_l ~ MatrixNormal(R_l, U_l, I)      l = 0, 1, 2
        x^3  ~  N(w, s2 I)          where  w ~ N(r, u I)                        the top layer

    MatrixNormal(R, U, I) means: every column of W_l is normal, with that column of R as its mean
    and with U as its covariance. We average over the weights, because we do not know them. Then
    what is left of each regression is its mean z R_l, and a variance v_l that has two parts, the
    noise s2 and our doubt about W_l:

        x^l  ~  N(z R_l, v_l I)     where  v_l = s2 + z U_l z^T
        x^3  ~  N(r, v_3 I)         where  v_3 = s2 + u

    The energy E is minus the logarithm of the product of these probabilities. "To explain best"
    means to minimise it:

        E = 1/2 sum_(l=0,1,2) [ |x^l - z R_l|^2 / v_l + d_l log(2 pi v_l) ]
          + 1/2               [ |x^3 - r|^2     / v_3 + H   log(2 pi v_3) ]

    symbol      code            shape       meaning
    P           dim                         the length of theta
    H           self.H                      the width of a hidden layer, 256
    x^0         x0              (P,)        theta, or its first |k| elements, the key
    x^1 ..      x[1] ..         (H,)        the hidden layers
    R_l, U_l    R[l], U[l]      (H, d_l), (H, H)        the belief about W_l
    r, u        r, u            (H,), a number          the belief about the top layer
    s2          s2                          the variance of the noise, sigma_obs^2
    d_l         d_0, H                      the number of elements of x^l that E counts

Two ways to read
    Only the key is known of x^0. What about the other elements of x^0, in E?
        read=marginal   E leaves them out: d_0 = |k|. (Ours, and the default.)
        read=joint      E is minimised over them, too. The best value for them is their prediction,
                        so they add no error. But they still count: d_0 = P. (Yoo & Wood's.)
    With `joint`, P log(v_0) outweighs everything else in E, and it is small if v_0 is small. That
    takes a small z, and then z R_0 is too small: what is recalled points in the right direction,
    but it is too short. On glyphs, its recall error is 0.31, and that of `marginal` is 0.05.
"""
import math

import torch
from torch.nn.functional import gelu

from data import Mistake


class BayesPCN:
    """A memory for vectors theta of `dim` elements, about as many as it has hidden units.

    From the paper (A.2) are the 4 layers, and, for reads, 500 steps of Adam with a learning rate of
    0.01. For the rest, it refers to the defaults of Yoo & Wood. Ours are: 256 hidden units, the two
    sigmas, the same search for writes and reads, a learning rate that falls during a search, and
    that a search ends when E no longer changes. `seed` draws the prior, and where a search begins.
    It has nothing to do with the seeds of til.py. Raises Mistake for an option out of range.
    """

    def __init__(self, dim, hidden=256, layers=4, sigma_prior=1.0, sigma_obs=0.01, lr=0.01,
                 steps=500, read="marginal", seed=0):
        if read not in ("marginal", "joint"):
            raise Mistake(f"bayespcn: read can be marginal or joint, not {read}")
        if hidden < 1 or layers < 2 or steps < 1:
            raise Mistake("bayespcn: hidden and steps must be at least 1, and layers at least 2")
        if not min(sigma_prior, sigma_obs, lr) > 0:
            raise Mistake("bayespcn: sigma_prior, sigma_obs and lr must be above 0")
        self.dim = dim
        self.H = hidden
        self.layers = layers
        self.lr = lr
        self.steps = steps
        self.read_mode = read
        self.seed = seed
        self.s2 = sigma_obs ** 2
        self.n_written = 0
        # The belief before the first write. It is float64, because a write adds 1 / s2, which is
        # 10,000, to a precision that begins at 1. The means are small random numbers: if R_0 were
        # zero, no hidden layers could explain theta better than others.
        widths = [dim] + [hidden] * (layers - 2)                                # d_l
        self.R = [self.noise(l, hidden, d) for l, d in enumerate(widths)]       # (H, d_l)
        self.U = [sigma_prior ** 2 * torch.eye(hidden).double() for _ in widths]     # (H, H)
        self.r = self.noise(layers - 1, 1, hidden)[0]                           # (H,)
        self.u = sigma_prior ** 2

    def write(self, key, value):
        """Stores theta = key (+) value."""
        theta = torch.cat([key, value]).double()                    # (P,)
        hidden = self.search(theta, self.dim, self.layers + 1 + self.n_written)
        self.update([theta, *hidden])

    def read(self, key):
        """The key (|k|,) -> theta_hat (P,)."""
        d_0 = len(key) if self.read_mode == "marginal" else self.dim
        hidden = self.search(key.double(), d_0, self.layers)
        value = gelu(hidden[0]) @ self.R[0][:, len(key):]           # what x^1 predicts: z R_0
        return torch.cat([key, value.to(key.dtype)])

    # ---- how an observation changes the belief: Bayes' rule ------------------------------------
    def update(self, x):
        """The belief after one observation of all layers, x = [x^0 (P,), x^1 (H,), ..]."""
        for l in range(self.layers - 1):
            self.regress(l, gelu(x[l + 1]), x[l])
        # At the top: precisions (1 / variance) add up, and the mean is weighted by them.
        u = 1 / (1 / self.u + 1 / self.s2)
        self.r = u * (self.r / self.u + x[-1] / self.s2)
        self.u = u
        self.n_written += 1

    def regress(self, l, z, y):
        """Bayesian linear regression: the belief about W_l after one example y = z W_l + noise.

        The precision U_l^-1 grows by outer(z, z) / s2. By the formula of Sherman and Morrison, U_l
        itself then changes by a matrix of rank one, so that no matrix has to be inverted.
        """
        R, U = self.R[l], self.U[l]
        Uz = U @ z                                                  # (H,)
        gain = Uz / (self.s2 + z @ Uz)                              # (H,)
        error = y - z @ R                                           # (d_l,)
        R.addr_(gain, error)                                        # R += outer(gain, error)
        U.addr_(gain, Uz, alpha=-1)                                 # U -= outer(gain, Uz)

    # ---- how the hidden layers are found: gradient descent on E --------------------------------
    @torch.enable_grad()
    def search(self, x0, d_0, stream):
        """The hidden layers (3, H) that explain x0 best. x0 is theta (P,) or a key (|k|,).

        `trace` then lists E at each step.
        """
        hidden = self.noise(stream, self.layers - 1, self.H).requires_grad_()
        error_0 = self.squared_error(x0)
        adam = torch.optim.Adam([hidden], self.lr)
        # With a constant learning rate, E would jump about its minimum for ever.
        schedule = torch.optim.lr_scheduler.LambdaLR(adam, self.decay)
        self.trace = []
        # The matrices are small, so more threads would only wait for each other.
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        for step in range(self.steps):
            E = self.energy(hidden, error_0, d_0)
            self.trace.append(E.item())
            if step > 0 and abs(self.trace[-1] - self.trace[-2]) < 1e-3:
                break
            adam.zero_grad()
            E.backward()                        # the gradient for the hidden layers
            adam.step()
            schedule.step()
        torch.set_num_threads(threads)
        return hidden.detach()

    def decay(self, step):
        """The factor of the learning rate: 1 for 30 % of the steps, then a straight line to 0."""
        return min(1, (1 - step / self.steps) / 0.7)

    def energy(self, hidden, error_0, d_0):
        """E for the hidden layers x^1, x^2, x^3 (3, H), from the top down.

        error_0(z) is |x^0 - z R_0|^2, and d_0 the number of elements of x^0 that count.
        """
        x = [None, *hidden]                                         # so x[l] is x^l
        top = self.layers - 1
        v = torch.tensor(self.s2 + self.u, dtype=torch.float64)
        E = minus_log_normal((x[top] - self.r).square().sum(), v, self.H)
        for l in reversed(range(top)):                              # x^(l+1) predicts x^l
            z = gelu(x[l + 1])
            v = self.s2 + z @ self.U[l] @ z
            if l == 0:
                E = E + minus_log_normal(error_0(z), v, d_0)
            else:
                error = (x[l] - z @ self.R[l]).square().sum()
                E = E + minus_log_normal(error, v, self.H)
        return E

    def squared_error(self, x0):
        """The function z -> |x0 - z R|^2, where R are the columns of R_0 that predict x0.

        Multiplied out, it is x0 x0^T - 2 z R x0^T + z R R^T z^T. What does not depend on z is
        computed once for a whole search. So a step takes O(H^2) operations, and not O(H |x0|).
        """
        R = self.R[0][:, :len(x0)]
        x0_x0, R_x0, R_R = x0 @ x0, R @ x0, R @ R.T
        return lambda z: x0_x0 - 2 * z @ R_x0 + z @ R_R @ z

    def noise(self, stream, rows, width):
        """Random numbers (rows, width) of variance 1 / width, the same for the same stream.

        Streams 0 to 3 are for the prior of each layer, 4 for where every read begins, and from 5 on
        for where each write begins.
        """
        generator = torch.Generator().manual_seed(100_003 * self.seed + stream)
        x = torch.randn(rows, width, generator=generator)
        return x.double() / math.sqrt(width)

    @property
    def nbytes(self):
        """The size of R, U and r in bytes."""
        return sum(x.nbytes for x in (*self.R, *self.U, self.r))


def minus_log_normal(error, v, d):
    """-log N(x; m, v I), for x and m with d elements, where error = |x - m|^2."""
    return (error / v + d * torch.log(2 * math.pi * v)) / 2
