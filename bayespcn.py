"""BayesPCN: an associative memory that writes by Bayesian regression and reads by descending an energy.

Yoo & Wood, "BayesPCN: A Continually Learnable Predictive Coding Associative Memory" (NeurIPS 2022, arXiv
2205.09930), with one particle. There are L layers of activations: x^0 = theta (P wide), and the hidden
x^1 .. x^(L-1) (H wide). Each layer predicts the one below it from z = GELU(x), a row vector. The weights W_l
are random, too:

    x^l | x^(l+1) ~ N(z W_l, s2 I),  W_l ~ MatrixNormal(R_l, U_l, I)    for l = 0 .. L-2
    x^(L-1)       ~ N(w, s2 I),      w ~ N(r, u I)                      at the top

The memory stores (R, U, r, u). With the weights integrated out, x^l ~ N(z R_l, v_l I), v_l = s2 + z U_l z^T,
and the energy is (d_0 = P, and d_l = H above)

    E = -log p = 1/2 sum_l [ |x^l - z R_l|^2 / v_l + d_l log(2 pi v_l) ]
               + 1/2 [ |x^(L-1) - r|^2 / (s2 + u) + H log(2 pi (s2 + u)) ]

write   x^0 is theta. Descend E over the hidden layers, then update every W_l by Bayes' rule.
read    Only the key, the first |k| columns of x^0, is known. Descend E, then predict the others by z R_0.
        joint      (Yoo & Wood's way) minimises over the unknown columns, too: then they fit perfectly, but
                   d_0 = P still counts them. So v_0, and theta, come out much too small.
        marginal   (ours, the default) integrates the unknown columns out: d_0 = |k|.
"""
import math

import torch
from torch.nn.functional import gelu


class BayesPCN:
    """A memory for about `hidden` vectors theta of `dim` elements, in float64 on the CPU. sigma_obs is
    sqrt(s2); sigma_prior is sqrt(u) at first. A descent takes at most `steps` steps of Adam with learning
    rate `lr`. After it, `trace` (steps, n) holds E at each step."""

    def __init__(self, dim, hidden=256, layers=4, sigma_prior=1.0, sigma_obs=0.01, lr=0.01, steps=500,
                 read="marginal", seed=0):
        if read not in ("marginal", "joint") or min(hidden, layers - 1, steps) < 1:
            raise ValueError("read is marginal or joint; hidden, steps are at least 1, layers at least 2")
        self.dim, self.hidden, self.layers, self.seed = dim, hidden, layers, seed
        self.s2, self.u_prior = sigma_obs ** 2, sigma_prior ** 2
        self.lr, self.steps, self.read_mode, self.trace = float(lr), int(steps), read, None
        self.R = [self.noise(l, hidden, hidden if l else dim) for l in range(layers - 1)]   # (H, d_l)
        self.U = [self.u_prior * torch.eye(hidden).double() for _ in self.R]                # (H, H)
        self.r, self.u = self.noise(layers - 1, 1, hidden)[0], self.u_prior                 # (H,), a number
        self.count, self.G = 0, None                                    # of writes; R_0 R_0^T, if it is known

    def noise(self, stream, rows, width):
        """Noise of variance 1 / width. stream: l: the prior of layer l; L: reads; L + 1 + t: write t."""
        generator = torch.Generator().manual_seed(100_003 * self.seed + stream)
        return (torch.randn(rows, width, generator=generator) / math.sqrt(width)).double()

    def observe(self, x0, d_0):
        """What `energy` needs to know about x0 (n, |x0|), the first columns of x^0, and all R, U and d.
        With R for these columns of R_0, |x0 - z R|^2 = x0 x0^T - 2 z c^T + z G z^T, where c = x0 R^T (n, H)
        and G = R R^T (H, H). Computed once, they make a step of the descent O(H^2) instead of O(H P).
        """
        R = self.R[0][:, :x0.shape[1]]
        whole = x0.shape[1] == self.dim
        G = self.G if whole and self.G is not None else R @ R.T         # O(H^2 |x0|)
        if whole and self.count > 0:                                    # before, R may still be assigned
            self.G = G                                                  # `condition` keeps it up to date
        d = torch.tensor([d_0] + [self.hidden] * (self.layers - 2)).double()[:, None]       # (L-1, 1)
        return x0.square().sum(1), x0 @ R.T, torch.stack([G, *self.R[1:]]), torch.stack(self.U), d

    def energy(self, x, observed):
        """E (n,) at the hidden activations x (L-1, n, H). x[l] is x^(l+1), which predicts layer l."""
        x0_x0, c, GR, U, d = observed                                   # GR = [G, R_1, .., R_(L-2)]
        z = gelu(x)                                                     # (L-1, n, H)
        v = self.s2 + ((z @ U) * z).sum(-1)                             # v_l = s2 + z U_l z^T  (L-1, n)
        zGR = z @ GR                                                    # z G, z R_1, ..  (L-1, n, H)
        bottom = x0_x0 + ((zGR[0] - 2 * c) * z[0]).sum(-1)              # |x^0 - z R_0|^2  (n,)
        above = (x[:-1] - zGR[1:]).square().sum(-1)                     # |x^l - z R_l|^2  (L-2, n)
        squared, v_top = torch.cat([bottom[None], above]), self.s2 + self.u                 # (L-1, n)
        top = (x[-1] - self.r).square().sum(-1) / v_top + self.hidden * math.log(2 * math.pi * v_top)
        return ((squared / v + d * torch.log(2 * math.pi * v)).sum(0) + top) / 2

    @torch.enable_grad()                                                # inference turns gradients off
    def descend(self, stream, observed):
        """Hidden activations (L-1, n, H) after Adam on E, from the same noise for every row. A row
        stops for good once its E changes by less than 1e-3, so that it does not depend on the other rows."""
        n, threads = len(observed[0]), torch.get_num_threads()
        x = self.noise(stream, self.layers - 1, self.hidden)[:, None].repeat(1, n, 1)
        mean, square, moving, trace = 0 * x, 0 * x, torch.ones(n, 1).double(), []
        torch.set_num_threads(1)                        # small matrices, and others may use the other cores
        for i in range(1, self.steps + 1):
            E = self.energy(x.requires_grad_(), observed)
            gradient, = torch.autograd.grad(E.sum(), x)
            trace.append(E.detach())
            if i > 1:
                moving = moving * ((trace[-1] - trace[-2]).abs() >= 1e-3)[:, None]
            if not moving.any():
                break
            mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient * gradient
            lr = self.lr * min(1, (1 - (i - 1) / self.steps) / 0.7)     # falls after 30 %, so that E settles
            step = (mean / (1 - 0.9 ** i)) / ((square / (1 - 0.999 ** i)).sqrt() + 1e-8)
            x = x.detach() - moving * lr * step
        torch.set_num_threads(threads)
        self.trace = torch.stack(trace)
        return x.detach()

    def write(self, key, value):
        """Stores theta = key (+) value, two vectors with `dim` elements together."""
        theta = torch.cat([key, value]).double()[None]                  # (1, P)
        hidden = self.descend(self.layers + 1 + self.count, self.observe(theta, self.dim))
        self.condition([theta, *hidden])

    def read(self, key):
        """theta_hat (dim,) for a key (|k|,), or (n, dim) for keys (n, |k|). ValueError if it is empty."""
        if self.count == 0:
            raise ValueError("the memory is empty: write to it first")
        k = key.reshape(-1, key.shape[-1]).double()                     # (n, |k|)
        d_0 = self.dim if self.read_mode == "joint" else k.shape[1]
        z = gelu(self.descend(self.layers, self.observe(k, d_0))[0])    # (n, H)
        value = z @ self.R[0][:, k.shape[1]:]                           # (n, P - |k|)
        return torch.cat([key, value.to(key.dtype).reshape(*key.shape[:-1], -1)], dim=-1)

    def condition(self, activations):
        """Bayes' rule with given activations [x0 (n, P), x1 (n, H), ..], row after row."""
        if self.count == 0:
            self.prior = [R.clone() for R in (*self.R, self.r)]         # for `forget`
        for x in zip(*(layer.double() for layer in activations)):       # x^0 (P,), x^1 (H,), ..
            for l, (R, U) in enumerate(zip(self.R, self.U)):            # layer l learns to map z to x^l
                z = gelu(x[l + 1])
                error = x[l] - z @ R                                    # (d_l,)
                gain = U @ z / (self.s2 + z @ U @ z)                    # U z^T / v_l  (H,)
                if l == 0 and self.G is not None:                       # (R + gain error) (R + gain error)^T
                    cross = torch.outer(gain, R @ error)
                    self.G = self.G + cross + cross.T + error @ error * torch.outer(gain, gain)
                R.addr_(gain, error)                                    # R <- R + gain (x^l - z R)
                U.sub_(torch.outer(gain, z @ U))                        # U <- U - gain z U
            u = 1 / (1 / self.u + 1 / self.s2)
            self.r, self.u, self.count = u * (self.r / self.u + x[-1] / self.s2), u, self.count + 1

    def forget(self, strength):
        """Moves the posterior towards the prior: strength 0 keeps everything, 1 forgets everything."""
        if self.count > 0:
            keep = math.sqrt(1 - strength)
            *self.R, self.r = [keep * R + (1 - keep) * R_0 for R, R_0 in zip((*self.R, self.r), self.prior)]
            prior = self.u_prior * torch.eye(self.hidden).double()
            self.U = [(1 - strength) * U + strength * prior for U in self.U]
            self.u, self.G = (1 - strength) * self.u + strength * self.u_prior, None

    def log_joint(self, activations):
        """log p (n,) of each row of [x0 (n, P), x1 (n, H), ..] by itself, with the weights integrated out."""
        x0, *x = (layer.double() for layer in activations)
        return -self.energy(torch.stack(x), self.observe(x0, self.dim))

    def state_dict(self):
        """The posterior, as tensors and numbers."""
        return {name: getattr(self, name) for name in ("R", "U", "r", "u", "count", "G")}

    def load_state_dict(self, state):
        """Restores what `state_dict` returned, in a new memory with the same arguments."""
        self.prior = [*self.R, self.r]
        for name, value in state.items():
            setattr(self, name, value)

    @property
    def nbytes(self):
        """Size of R, U and r in bytes; G can be computed from R."""
        return sum(x.nbytes for x in (*self.R, *self.U, self.r))
