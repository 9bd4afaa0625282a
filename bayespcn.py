"""BayesPCN: an associative memory made of Bayesian linear regressions, one above the other.

Yoo & Wood, "BayesPCN: A Continually Learnable Predictive Coding Associative Memory" (NeurIPS 2022,
arXiv 2205.09930), with one particle: one belief, no mixture of several.

There are L = 4 layers of activations x^l, d_l wide: x^0 = theta (d_0 = P), and the hidden layers
x^1 .. x^(L-1) (d_l = H). Regression l predicts x^l from the layer above it: from z = GELU(x^(l+1)),
a row vector. The inputs z are not known. So a write and a read both begin with a search for the
hidden layers that explain x^0 best. The weights W_l are random variables, of which only a belief is
kept:

    x^l | x^(l+1), W_l ~ N(z W_l, s2 I),  W_l ~ MatrixNormal(R_l, U_l, I)    for l = 0 .. L-2
    x^(L-1) | w        ~ N(w, s2 I),      w ~ N(r, u I)                      at the top

The belief consists of the means R_l (H, d_l) and r (H,), the covariance U_l (H, H) between the H
rows of W_l, which all its columns share, and the variance u. So each element of z W_l has the
variance z U_l z^T. With the weights integrated out,

    x^l | x^(l+1) ~ N(z R_l, v_l I)  with v_l = s2 + z U_l z^T
    x^(L-1)       ~ N(r, v I)        with v = s2 + u

and the energy is

    E = -log p(x^0, .., x^(L-1)) = 1/2 sum_l [ |x^l - z R_l|^2 / v_l + d_l log(2 pi v_l) ]
                                 + 1/2 [ |x^(L-1) - r|^2 / v + H log(2 pi v) ]

write   x^0 is theta. Descend E over the hidden layers, then update the belief by Bayes' rule. So E
        becomes low there, and a read can descend to the same place, from a part of x^0.
read    Only the key, the first |k| columns of x^0, is known. Descend E over the hidden layers, then
        predict the other columns by z R_0.
        joint      (Yoo & Wood's way) minimises over the unknown columns, too. That needs no search:
                   at the minimum, they equal their prediction z R_0, and add no error. But they
                   count in d_0 = P: P log v_0 favours a small v_0 = s2 + z U_0 z^T, which takes a
                   small z, and so a small theta, z R_0.
        marginal   (ours, the default) integrates the unknown columns out: d_0 = |k|.

        How much too small? At the z of a write, z U_0 z^T is about s2. Among the multiples of that
        z, the first term of E (l = 0) is least at (1 - e) z, with e = d_0 s2 / (k k^T) if that is
        small: on glyphs 0.05 for marginal (as measured), 0.46 for joint (measured 0.31).
"""
import math

import torch
from torch.nn.functional import gelu


def minus_log_normal(error, v, d):
    """-log N(x; m, v I) for x and m with d elements, where error = |x - m|^2."""
    return (error / v + d * torch.log(2 * math.pi * v)) / 2


class BayesPCN:
    """A memory for about `hidden` vectors theta of `dim` elements, in float64 on the CPU.

    (A regression on `hidden` inputs fits about as many rows.) The paper (A.2) has 4 layers, and for
    reads 500 steps and a learning rate of 0.01. That writes have the same, that the rate falls, and
    that a descent may end early (most would have fallen a little more), is ours. The paper's rate
    of weight updates has no place here: Bayes' rule updates them. For the rest the paper refers to
    Yoo & Wood's defaults; whether ours are theirs is not checked.

    sigma_obs is sqrt(s2), for all layers. Before the first write, u is sigma_prior^2, U_l is u I,
    and R_l and r are `noise`. (If R_0 were 0, x^0 would favour no direction of z.) A descent takes
    at most `steps` steps of Adam, whose learning rate begins at `lr`. After it, `trace` lists E
    before each step. `seed` is none of til.py's --seeds: all runs have the same draws.
    """

    def __init__(self, dim, hidden=256, layers=4, sigma_prior=1.0, sigma_obs=0.01, lr=0.01,
                 steps=500, read="marginal", seed=0):
        if read not in ("marginal", "joint"):
            raise ValueError(f"read is marginal or joint, not {read}")
        if not all(isinstance(n, int) and n > 0 for n in (hidden, layers - 1, steps)):
            raise ValueError("hidden, layers and steps are whole numbers, from 1, 2 and 1 on")
        if not min(map(float, (sigma_prior, sigma_obs, lr))) > 0:
            raise ValueError("sigma_prior, sigma_obs and lr are numbers above 0")
        self.dim = dim
        self.H = hidden
        self.layers = layers
        self.lr = float(lr)
        self.steps = steps
        self.read_mode = read
        self.seed = seed
        self.s2 = sigma_obs ** 2
        self.u = self.u_prior = sigma_prior ** 2
        # float64: a write adds outer(z, z) / s2, with 1 / s2 = 10,000, to a precision of I.
        self.U_prior = self.u_prior * torch.eye(hidden, dtype=torch.float64)
        widths = [dim] + [hidden] * (layers - 2)                    # d_l
        self.R = [self.noise(l, hidden, d) for l, d in enumerate(widths)]       # (H, d_l)
        self.U = [self.U_prior.clone() for _ in widths]                         # (H, H)
        self.r = self.noise(layers - 1, 1, hidden)[0]                           # (H,)
        self.n_written = 0

    def write(self, key, value):
        """Stores theta = key (+) value, two vectors with `dim` elements together."""
        theta = torch.cat([key, value]).double()                    # (P,)
        hidden = self.descend(theta, self.dim, stream=self.layers + 1 + self.n_written)
        # Only now is the belief updated: during the descent, the memory does not change.
        self.condition([theta[None], *hidden[:, None]])             # one row: (1, P), (1, H), ..

    def read(self, key):
        """theta_hat (dim,) for a key (|k|,); for several keys (n, |k|), one after the other."""
        if self.n_written == 0:
            raise ValueError("the memory is empty: write to it first")
        if key.dim() > 1:
            return torch.stack([self.read(k) for k in key])
        n_known = len(key)
        d_0 = n_known if self.read_mode == "marginal" else self.dim
        hidden = self.descend(key.double(), d_0, stream=self.layers)
        value = gelu(hidden[0]) @ self.R[0][:, n_known:]            # z R_0, the unknown columns
        return torch.cat([key, value.to(key.dtype)])

    def condition(self, activations):
        """Bayes' rule with the activations [x0 (n, P), x1 (n, H), ..], row after row.

        A write has one row. Tests, which choose the hidden layers, have several.
        """
        if self.n_written == 0:
            self.R_prior = [R.clone() for R in self.R]              # for `forget`
            self.r_prior = self.r.clone()
        for row in zip(*activations):
            x = [layer.double() for layer in row]                   # x^0 (P,), x^1 (H,), ..
            for l in range(self.layers - 1):
                self.regress(l, gelu(x[l + 1]), x[l])
            u = 1 / (1 / self.u + 1 / self.s2)                      # precisions add up
            self.r = u * (self.r / self.u + x[-1] / self.s2)
            self.u = u
            self.n_written += 1

    def regress(self, l, z, y):
        """Bayesian linear regression of y = x^l (d_l,) on z (H,): U_l^-1 gains outer(z, z) / s2.

        The Sherman-Morrison formula makes that a change of U_l itself, without an inverse.
        """
        R = self.R[l]
        U = self.U[l]
        # What one observation adds to R, and to U, is a matrix of rank one.
        Uz = U @ z                                                  # U z^T  (H,)
        gain = Uz / (self.s2 + z @ Uz)                              # U z^T / v_l  (H,)
        R.addr_(gain, y - z @ R)                                    # R <- R + gain (y - z R)
        U.addr_(gain, Uz, alpha=-1)                                 # U <- U - gain z U

    # ---- the energy, and its descent -----------------------------------------------------------
    @torch.enable_grad()                    # works under torch.no_grad(), too
    def descend(self, x0, d_0, stream):
        """The hidden layers (L-1, H) that explain x0, theta or a key, by Adam on E from noise."""
        hidden = self.noise(stream, self.layers - 1, self.H).requires_grad_()
        error_0 = self.squared_error(x0)
        adam = torch.optim.Adam([hidden], self.lr)
        # At a constant rate, E ends on a noisy plateau. It settles as the rate falls.
        schedule = torch.optim.lr_scheduler.LambdaLR(adam, self.decay)
        self.trace = []
        # The matrices are small: more threads gain nothing, and wait long for cores that are busy.
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        for step in range(self.steps):
            E = self.energy(hidden, error_0, d_0)
            E.backward()                    # with respect to the activations, not to the weights
            self.trace.append(E.item())
            # Two steps that differ by so little count as the end.
            if step > 0 and abs(self.trace[-1] - self.trace[-2]) < 1e-3:
                break
            adam.step()
            schedule.step()
            adam.zero_grad()
        torch.set_num_threads(threads)
        return hidden.detach()

    def decay(self, step):
        """The factor of the learning rate: 1 for 30 % of the steps, then a straight line to 0."""
        return min(1, (1 - step / self.steps) / 0.7)

    def energy(self, hidden, error_0, d_0):
        """E at the hidden activations x^1, x^2, .., the rows of `hidden` (L-1, H).

        error_0(z) is |x^0 - z R_0|^2 over the known columns of x^0. d_0 is P or, in a marginal
        read, |k|.
        """
        x = [None, *hidden]                                         # x[l] is x^l; error_0 has x^0
        E = 0
        for l in range(self.layers - 1):                            # x^(l+1) predicts x^l
            z = gelu(x[l + 1])
            v = self.s2 + z @ self.U[l] @ z
            if l == 0:
                E = E + minus_log_normal(error_0(z), v, d_0)
            else:
                error = (x[l] - z @ self.R[l]).square().sum()
                E = E + minus_log_normal(error, v, self.H)
        v = x[-1].new_tensor(self.s2 + self.u)                      # at the top; a tensor, for log
        error = (x[-1] - self.r).square().sum()
        return E + minus_log_normal(error, v, self.H)

    def squared_error(self, x0):
        """The function z -> |x0 - z R|^2, for x0 (m,), and R the first m columns of R_0.

        Multiplied out, it is x0 x0^T - 2 z R x0^T + z (R R^T) z^T. With R x0^T (H,) and R R^T
        (H, H) computed once for a descent, a step costs O(H^2) instead of O(H m).
        """
        R = self.R[0][:, :len(x0)]
        x0_x0 = x0 @ x0
        R_x0 = R @ x0
        R_R = R @ R.T
        return lambda z: x0_x0 - 2 * z @ R_x0 + z @ R_R @ z

    def noise(self, stream, rows, width):
        """Noise (rows, width) of variance 1 / width, the same for the same stream.

        stream: l for the prior of layer l, L for the start of every read, L + 1 + t for that of
        write t = 0, 1, ..
        """
        generator = torch.Generator().manual_seed(100_003 * self.seed + stream)
        x = torch.randn(rows, width, generator=generator)
        return x.double() / math.sqrt(width)

    def forget(self, strength):
        """Moves the belief towards the prior: strength 0 keeps it, 1 restores the prior.

        W becomes keep W + (1 - keep) R_prior + noise N(0, strength * U_prior). Like log_joint, it
        is Yoo & Wood's, and not used by til.py and mts.py.
        """
        if self.n_written == 0:
            return
        keep = math.sqrt(1 - strength)
        self.R = [keep * R + (1 - keep) * prior for R, prior in zip(self.R, self.R_prior)]
        self.U = [(1 - strength) * U + strength * self.U_prior for U in self.U]
        self.r = keep * self.r + (1 - keep) * self.r_prior
        self.u = (1 - strength) * self.u + strength * self.u_prior

    def log_joint(self, activations):
        """-E (n,) of each row of [x0 (n, P), x1 (n, H), ..], given the belief alone."""
        rows = zip(*(layer.double() for layer in activations))
        E = [self.energy(hidden, self.squared_error(x0), self.dim) for x0, *hidden in rows]
        return -torch.stack(E)

    @property
    def nbytes(self):
        """Size of R, U and r in bytes. (The copy of the prior, for `forget`, is not counted.)"""
        return sum(x.nbytes for x in (*self.R, *self.U, self.r))
