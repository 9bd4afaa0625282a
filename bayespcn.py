"""BayesPCN: a memory that stores by Bayesian regression and recalls by descending an energy.

Source: Yoo & Wood, "BayesPCN: A Continually Learnable Predictive Coding Associative Memory", NeurIPS 2022,
arXiv 2205.09930, with one particle; write and read as in section 3.1 of the paper this project builds.

L layers of activations: x⁰ = θ (D wide), x¹ .. x^{L−1} hidden (H wide); z^{l+1} = GELU(x^{l+1}), a row vector.

    x^{L−1} ~ N(w, σ² I),  w ~ N(r, u I)      x^l ~ N(z^{l+1} W_l, σ² I),  W_l ~ MatrixNormal(R_l, U_l, I)

What is stored is (R, U, r, u), the belief about the weights. Integrated over, they leave x^l ~ N(z R_l, v_l I) with
v_l = σ² + z U_l zᵀ. The energy is −log p(x⁰ .. x^{L−1}), where d_0 = D and d_l = H above:

    E = ½ Σ_l [ ‖x^l − z R_l‖² / v_l + d_l log 2πv_l ] + ½ [ ‖x^{L−1} − r‖² / (σ²+u) + H log 2π(σ²+u) ]

Write: clamp x⁰ to θ, descend E over the hidden activations, then regress each layer on the one above.
Read: only the key k, the first |k| columns of x⁰, is known. Descend E, answer k ⊕ (z R_0)[missing]. Two ways:
    joint     (Yoo & Wood's) minimise over the missing values too: they land on their prediction z R_0 and leave
              the residual, but stay counted in log v:    ½ [ ‖k − z R_0[:, :|k|]‖² / v_0 + D log v_0 ]
    marginal  (ours) integrate them out:                  ½ [ ‖k − z R_0[:, :|k|]‖² / v_0 + |k| log v_0 ]

Why marginal recalls better: scale a stored θ's z by a; it predicts about aθ, and v_0 grows with a². A write weighs D
columns of residual against D log v_0. `marginal` keeps that balance, |k| to |k|, and so finds the amplitude again.
`joint` pays for D columns but hears only |k|: it finds the right pattern and returns it too faint. Both also shrink
as ridge regression does, to about (1 − σ² / mean(θ²)) θ, which alone is a relative squared error of (σ² / mean(θ²))².
"""

import copy
import math

import numpy as np
import torch
from torch.nn.functional import gelu


def check(name, x, *shape):
    """Raises ValueError unless x is a finite floating-point tensor of this shape (None: any size)."""
    if not isinstance(x, torch.Tensor) or not x.is_floating_point():
        raise ValueError(f"{name} is {getattr(x, 'dtype', type(x))}, expected a floating-point tensor: convert it")
    if x.ndim != len(shape) or any(size not in (None, found) for size, found in zip(shape, x.shape)):
        raise ValueError(f"{name} has shape {tuple(x.shape)}, expected {shape} (None: any): check how theta was cut")
    if not x.isfinite().all():
        raise ValueError(f"{name} holds NaN or infinite elements, expected finite ones: did the training diverge?")


def product(x, W):
    """x (L-1, n, H) @ W (L-1, H, H), x a numpy array or a tensor as in a descent, W a tensor."""
    if torch.is_tensor(x):
        return x @ W
    # For one row numpy is up to twice as fast; for more its threads, which it does not let us limit, get in torch's way.
    return x @ W.numpy() if x.shape[1] == 1 else (torch.from_numpy(x) @ W).numpy()


def ndtr(x):
    """The distribution function of N(0, 1) at x, an array or a tensor."""
    return torch.special.ndtr(x) if torch.is_tensor(x) else torch.special.ndtr(torch.from_numpy(x)).numpy()


class BayesPCN:
    """A memory for vectors theta of length `dim`; `hidden` is H, `layers` L, `sigma_obs` σ, `sigma_prior` √u at first.

    A descent takes at most `steps` steps of Adam, from `lr` down; `read` is "marginal" or "joint"; `seed` draws prior
    and starts; R, U, r live on `device`. R, U, r, u may be assigned (float64) and are the memory's own then; what is assigned to
    R and r before the first write is their prior. Raises ValueError.
    """

    def __init__(self, dim, hidden=256, layers=4, sigma_prior=1.0, sigma_obs=0.01, lr=0.01, steps=500,
                 read="marginal", seed=0, device="cpu"):
        for name, x, least in (("dim", dim, 1), ("hidden", hidden, 1), ("layers", layers, 2), ("steps", steps, 1)):
            if not isinstance(x, int) or x < least:
                raise ValueError(f"{name} is {x!r}, expected a whole number, {least} or more")
        for name, x in (("sigma_prior", sigma_prior), ("sigma_obs", sigma_obs), ("lr", lr)):
            if not 0 < x < math.inf:
                raise ValueError(f"{name} is {x!r}, expected a positive number")
        if read not in ("marginal", "joint"):
            raise ValueError(f"read is {read!r}, expected 'marginal' or 'joint'")
        self.config = dict(dim=dim, hidden=hidden, layers=layers, sigma_prior=sigma_prior, sigma_obs=sigma_obs, seed=seed)
        self.dim, self.hidden, self.layers, self.seed = dim, hidden, layers, seed
        self.s2, self.u_prior, self.lr, self.steps, self.read_mode = sigma_obs ** 2, sigma_prior ** 2, lr, steps, read
        self.R = [torch.stack([*self._prior(l)]).to(device) for l in range(layers - 1)]                     # (H, d_l)
        self.U = [self.u_prior * torch.eye(hidden, dtype=torch.float64, device=device) for _ in self.R]     # (H, H)
        self.r = next(self._prior(layers - 1)).to(device)                                                   # (H,)
        self.u, self.count = self.u_prior, 0                                      # count: of writes
        self.assigned = {}                       # the prior of those layers whose R was assigned, not drawn: `forget` needs it
        self._G = self._gram_of = None

    def _normal(self, stream, rows, width):
        """Yields `rows` vectors (width,) ~ N(0, I / width). Streams: l: prior of R_l, L: reads, L+1+t: write t."""
        generator = torch.Generator().manual_seed(100_003 * self.seed + stream)
        for _ in range(rows):
            yield torch.randn(width, generator=generator).div_(math.sqrt(width)).double()

    def _prior(self, l):
        """Yields the rows of R_l's prior (l = L-1: of r), drawn anew each time: a copy would double the memory."""
        return self._normal(l, self.hidden if l < self.layers - 1 else 1, self.hidden if l else self.dim)

    def _gram(self):
        """G = R_0 R_0ᵀ (H, H): kept up to date by `_update`; O(H² D) only once R[0] is another tensor, as after forget."""
        if self._gram_of is not self.R[0]:
            self._gram_of, self._G = self.R[0], self.R[0] @ self.R[0].T
        return self._G

    def _bottom(self, x, m):
        """What E depends on if x (n, |x|) are the first columns of x⁰ and m log v_0 is counted; layers are stacked: W (L-1, H, H)
        = [G, R_1, ..], U (L-1, H, H), x·x (n,), c (n, H), d (L-1, 1) = [m, H, ..], r (H,), σ² + u."""
        # ‖x − zR‖² = x·x − 2 z·c + z G zᵀ, c = R xᵀ, G = R Rᵀ: a step costs O(H²), not O(H D). float64, as it cancels.
        R = self.R[0][:, :x.shape[1]]
        xx, c, G = x.square().sum(-1), x @ R.T, self._gram() if x.shape[1] == self.dim else R @ R.T
        d = self.r.new_tensor([[m]] + [[self.hidden]] * (self.layers - 2))        # (L-1, 1)
        small = xx, c, d, self.r, self.r.new_tensor(float(self.s2 + self.u))
        # On a CPU numpy has half of torch's overhead on arrays so small.
        small = small if self.r.is_cuda else [x.numpy() for x in small]
        return torch.stack([G, *self.R[1:]]), torch.stack(self.U), *small

    def _energy(self, x, W, U, xx, c, d, r, v_top):
        """E (n,) and, three times as fast as autograd, ∂E/∂x (L-1, n, H) at x (L-1, n, H), where x[l] is x^{l+1}."""
        xp = torch if torch.is_tensor(x) else np
        cdf, pdf = ndtr(x), xp.exp(x * x / -2) / math.sqrt(2 * math.pi)
        z, slope = x * cdf, cdf + x * pdf                                         # GELU(x), GELU'(x)
        zU, zW = product(z, U), product(z, W)                                     # (L-1, n, H), zW[0] is zG
        v = self.s2 + (zU * z).sum(-1)                                            # v = σ² + z U zᵀ  (L-1, n)
        e, e_top = x[:-1] - zW[1:], x[-1] - r                                     # x^l − z R_l  (L-2, n, H), (n, H)
        # q_0 = x·x − 2 z·c + z G zᵀ,  q_l = ‖x^l − z R_l‖²
        q = xp.concatenate([(xx + (z[0] * (zW[0] - 2 * c)).sum(-1))[None], (e * e).sum(-1)])      # (L-1, n)
        E_top = (e_top * e_top).sum(-1) / v_top + self.hidden * xp.log(2 * math.pi * v_top)       # (n,)
        E = 0.5 * ((q / v + d * xp.log(2 * math.pi * v)).sum(0) + E_top)
        # ∂E/∂z = (½q' + (d − q/v) ½v') / v,  with ½q' = zG − c for layer 0 and −(x^l − z R_l) R_lᵀ above,  ½v' = zU
        dq = xp.concatenate([(zW[0] - c)[None], -product(e, W[1:].mT)])           # (L-1, n, H)
        g = (dq + (d - q / v)[..., None] * zU) / v[..., None] * slope
        g[:-1] += e / v[1:, :, None]        # x^l is also what layer l predicts: ∂E/∂x^l += (x^l − z R_l) / v_l
        g[-1] += e_top / v_top
        return E, g

    def _adam(self, i, x, m, s, E_before, moving, *bottom):
        """Step i = 1, 2, .. of Adam on E. Rows stop `moving` (n,), for good, once E changes by < 1e-3."""
        E, g = self._energy(x, *bottom)
        moving = moving * (abs(E - E_before) >= 1e-3)                             # (n,)
        m, s = 0.9 * m + 0.1 * g, 0.999 * s + 0.001 * g * g
        # Constant for 30 % of the steps, then falls linearly to 0: activations are near 0.003, and with a constant 0.01 they
        # never settle; rounding alone, as by another batch size, then moved theta_hat by up to 14 %.
        lr = self.lr * ((1 - (i - 1) / self.steps) / 0.7).clip(None, 1)
        x = x - moving[:, None] * lr * (m / (1 - 0.9 ** i)) / ((s / (1 - 0.999 ** i)) ** 0.5 + 1e-8)
        return i + 1, x, m, s, E, moving

    def _descend(self, stream, bottom):
        """x (L-1, n, H) after Adam on E, from the stream's noise: the same in every row, so that an answer does not depend on
        its companions."""
        start, n = torch.stack([*self._normal(stream, self.layers - 1, self.hidden)])[:, None], len(bottom[2])     # of x·x
        x = start.to(self.r).repeat(1, n, 1)
        state = [x.new_ones(()), x, 0 * x, 0 * x, x.new_full((n,), math.inf), x.new_ones(n)]
        if x.is_cuda:
            return self._descend_on_gpu(state, bottom)
        state, threads = [x.numpy() for x in state], torch.get_num_threads()
        torch.set_num_threads(1)    # no slower on arrays this small, and 50 times faster where others use the cores
        try:
            while state[0] <= self.steps and state[-1].any():
                state = self._adam(*state, *bottom)
        finally:
            torch.set_num_threads(threads)
        return torch.from_numpy(state[1])

    def _descend_on_gpu(self, state, bottom):
        """The same with tensors: a step is captured as a CUDA graph, since its 60 kernels take longer to launch than to run."""
        graph = torch.cuda.CUDAGraph()
        self._adam(*state, *bottom)                                               # what is set up on first use cannot be captured
        with torch.cuda.graph(graph):
            for old, new in zip(state, self._adam(*state, *bottom)):
                old.copy_(new)
        for i in range(self.steps):
            graph.replay()
            if i % 20 == 19 and not state[-1].any():                              # to look costs a wait; rows that stopped do stop
                break
        return state[1]

    def write(self, key, value):
        """Stores theta = key ⊕ value, 1-D floating-point tensors of `dim` elements together. Raises ValueError."""
        check("key", key, None)
        check("value", value, self.dim - len(key))
        theta = torch.cat([key.to(self.r), value.to(self.r)])[None]               # (1, D)
        self.condition([theta, *self._descend(self.layers + 1 + self.count, self._bottom(theta, self.dim))])

    def read(self, key):
        """theta_hat (dim,) of a key (|k|,), (n, dim) of (n, |k|), in its dtype. Raises ValueError, also when empty."""
        rows = key[None] if getattr(key, "ndim", 0) == 1 else key                 # (n, |k|)
        check("key", rows, None, None)
        width = rows.shape[1]
        if not 1 <= width <= self.dim:
            raise ValueError(f"key has {width} elements, expected 1 to {self.dim}: pass the start of a theta")
        if self.u == self.u_prior:      # every write lowers u, forget(1) restores it
            raise ValueError("the memory is empty, expected at least one stored theta: write first")
        m = self.dim if self.read_mode == "joint" else width
        x = self._descend(self.layers, self._bottom(rows.to(self.r), m))
        value = gelu(x[0]) @ self.R[0][:, width:]                                 # (z R_0)[missing]  (n, D-|k|)
        return torch.cat([rows, value.to(rows)], 1).reshape(*key.shape[:-1], -1)

    def _layers(self, activations):
        """[x0 (n, D), x1 (n, H), ..], checked -> x0 (n, D) and the hidden ones (L-1, n, H), float64, on the memory's device."""
        if len(activations) != self.layers:
            raise ValueError(f"found {len(activations)} layers of activations, expected {self.layers}: pass x0, x1, ..")
        for l, x in enumerate(activations):
            check(f"x{l}", x, len(activations[0]), self.hidden if l else self.dim)
        return activations[0].to(self.r), torch.stack([x.to(self.r) for x in activations[1:]])

    def log_joint(self, activations):
        """log p (n,) of each row of [x0 (n, D), x1 (n, H), ..] by itself, weights integrated out. Raises ValueError."""
        x0, x = self._layers(activations)
        E, _ = self._energy(x if x.is_cuda else x.numpy(), *self._bottom(x0, self.dim))
        return -torch.as_tensor(E)

    def condition(self, activations):
        """Bayes' rule with given activations [x0 (n, D), x1 (n, H), ..], row after row. Raises ValueError."""
        x0, x = self._layers(activations)
        if self.u == self.u_prior:      # nothing stored: R is the prior, and one that was assigned must be kept
            self.assigned = {l: R for l, R in enumerate([*self.R, self.r[None]])
                             if not torch.equal(R[0].cpu(), next(self._prior(l)))}
            self.R = [R.clone() if l in self.assigned else R for l, R in enumerate(self.R)]
        for row in zip(x0, *x):
            self._update(row)

    def _update(self, x):
        """The conjugate update with one row x⁰ (D,), x¹ (H,), ..: in each layer the input is z, the target y = x^l."""
        G = self._gram()
        for l, (R, U) in enumerate(zip(self.R, self.U)):
            z = gelu(x[l + 1])                                                    # (H,)
            zU = z @ U
            K = zU / (zU @ z + self.s2)                                           # K = U zᵀ / s,  s = z U zᵀ + σ²
            e = x[l] - z @ R                                                      # y − zR  (d_l,)
            if l == 0:          # (R + K e)(R + K e)ᵀ = G + K (R eᵀ)ᵀ + (R eᵀ) Kᵀ + ‖e‖² K Kᵀ
                KRe = torch.outer(K, R @ e)
                G = G + KRe + KRe.T + (e @ e) * torch.outer(K, K)
            R.addr_(K, e)                                                         # R ← R + K (y − zR)
            self.U[l] = torch.addr(U, K, zU, alpha=-1)                            # U ← U − K z U
        self._G = G
        u = 1 / (1 / float(self.u) + 1 / self.s2)                                 # u' = 1 / (1/u + 1/σ²)
        self.r, self.u = u * (self.r / self.u + x[-1] / self.s2), u               # r' = u' (r/u + x^{L−1}/σ²)
        self.count += 1

    def forget(self, strength):
        """Moves the posterior towards the prior: b = `strength` 0 keeps all, 1 forgets all. Raises ValueError."""
        if not 0 <= strength <= 1:
            raise ValueError(f"strength is {strength!r}, expected 0 (keep all) to 1 (forget all)")
        if self.u == self.u_prior:      # nothing stored
            return
        keep = math.sqrt(1 - strength)
        faded = [keep * R for R in (*self.R, self.r[None])]
        for l, R in enumerate(faded):
            for row, prior in zip(R, self.assigned.get(l, self._prior(l))):       # R ← √(1−b) R + (1 − √(1−b)) R₀
                row.add_(prior.to(row), alpha=1 - keep)
        *self.R, (self.r,) = faded
        self.U = [(1 - strength) * U + strength * self.u_prior * torch.eye(self.hidden).to(U) for U in self.U]
        self.u = (1 - strength) * self.u + strength * self.u_prior                # U ← (1−b) U + b U₀

    def state_dict(self):
        """A copy of the state, in plain tensors and numbers, so that torch.load(.., weights_only=True) reads it."""
        self._gram()        # G is kept, too: summed up write by write, it differs from R_0 R_0ᵀ in the last bits
        return copy.deepcopy({name: getattr(self, name) for name in ("config", "count", "R", "U", "r", "u", "assigned", "_G")})

    def load_state_dict(self, state):
        """Takes over a copy of the state. Raises ValueError if it is of a memory with other constructor arguments."""
        def shapes(R, U, r):
            return [x.shape for x in (*R, *U, r)]
        same = shapes(state["R"], state["U"], state["r"]) == shapes(self.R, self.U, self.r)
        if state.get("config") != self.config or not same or state["_G"].shape != self.U[0].shape:
            raise ValueError(f"state of a memory with {state.get('config')}, expected {self.config}: make one like it")
        new, device = copy.deepcopy(state), self.r.device
        new |= {"u": float(new["u"]), "count": int(new["count"])}
        new |= {name: [x.to(device) for x in new[name]] for name in ("R", "U")} | {name: new[name].to(device) for name in ("r", "_G")}
        vars(self).update(new, _gram_of=new["R"][0])

    @property
    def nbytes(self):
        """Bytes of the belief (R, U, r), and of the prior if it was assigned."""
        return sum(x.nbytes for x in (*self.R, *self.U, self.r, *self.assigned.values()))
