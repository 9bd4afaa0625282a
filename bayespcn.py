"""BayesPCN (Yoo & Wood, NeurIPS 2022, arXiv 2205.09930) as a memory.

The idea
    The memory is a small network that generates theta from the top down. It has four layers of
    activations, x^0 to x^3, and three weight matrices. (The number after ^ is that of the layer,
    and not a power.) Each layer predicts the one below it:

                     write                                   read
        x^3   [        ?        ]  searched       [        ?        ]  searched
                       | W_2                                | W_2
        x^2   [        ?        ]  searched       [        ?        ]  searched
                       | W_1                                | W_1
        x^1   [        ?        ]  searched       [        ?        ]  searched
                       | W_0                                | W_0
        x^0   [ key |   value   ]  known          [ key |     ?     ]  the key is known

    A write is given theta, and a read only its key. Both begin with the same search: which numbers
    in the hidden layers x^1, x^2, x^3 best explain what is known?
        - A write stores theta. No x^1 predicts a new theta yet: every prediction is wrong, by about
          the size of theta. But each prediction comes with a variance, which says how unsure the
          memory is at this x^1. (It is small at an x^1 that is like those of earlier writes: see
          v_0 below.) Where the variance is small, an error of this size is nearly impossible. Where
          it is large, the error is no surprise. So the search ends at an x^1 where the memory is
          unsure. This x^1 becomes the address of theta: the write changes the weights, so that from
          now on, x^1 predicts theta, both the key and the value.
        - A read finds the address again, from the key. A key has thousands of elements, and x^1 has
          only 256, so hardly any other x^1 predicts this key. (Nothing guarantees that a search
          finds it.) Then the read lets this x^1 predict the value.

What is Bayesian about it
    Each prediction is a linear regression with weights W_l. The memory does not decide what the
    weights are. It has a belief about them: a normal distribution with a mean R_l and a covariance
    U_l. When the search of a write is done, its hidden layers count as observed, and Bayes' rule
    says how this observation changes the belief. That is one step, without a learning rate.

    Why do later writes not destroy what earlier ones have stored? Theta is predicted from
    z = GELU(x^1), as z R_0, which is linear in z. So each theta needs a direction of z of its own.
    (If z keeps its direction and becomes shorter, so does the theta that it predicts.) So an
    address has two parts: the direction of z says which theta is meant, and the length of z says
    how much of it is recalled. Two things protect what is stored:
        - The search of a write ends in an unused direction. There, the memory is in doubt (the
          variance v_0 of its prediction, below, is large), so any theta is possible. In a direction
          that was used before, the memory is sure of its prediction, so a new theta is very
          unlikely.
        - The update changes the predictions most where the memory was in doubt. In the used
          directions, where it was sure, they hardly change.
    Each write uses up about one of the 256 directions of z. So about 256 thetas fit. If there are
    more, the recall of all of them suffers.

The symbols, to look up as you read on
    symbol      code            shape       meaning
    P           dim                         how many elements theta has
    H           self.H                      the width of a hidden layer, 256
    x^0         x0              (P,)        theta; in a read, its first |k| elements, the key
    x^1 ..      hidden, x[1] .. (H,)        the hidden layers
    R_0, R_1 .. R[l]            (H, P), (H, H) ..       the mean of W_l
    U_0, U_1 .. U[l]            (H, H)                  the covariance of each column of W_l
    r, u        r, u            (H,), a number          mean and variance of w (see the top layer)
    s2          s2                          the variance of the noise, sigma_obs^2
    d_l         d_0, H                      how many elements of x^l count in E: for x^0, P or
                                            |k| (see `Two ways to read`), for the others, H

The model
    Regression l predicts x^l from z = GELU(x^(l+1)). All of these are row vectors:

        x^l  ~  N(z W_l, s2 I)      where  W_l ~ MatrixNormal(R_l, U_l, I)      l = 0, 1, 2
        x^3  ~  N(w, s2 I)          where  w ~ N(r, u I)                        the top layer

    MatrixNormal(R, U, I) means: each column of W_l is normal, with the same column of R as its mean
    and with U as its covariance. The weights are not known, so we average over them. After that,
    x^l is normal with the mean z R_l. Its variance v_l has two parts, the noise and our doubt
    about W_l:

        x^l  ~  N(z R_l, v_l I)     where  v_l = s2 + z U_l z^T
        x^3  ~  N(r, v_3 I)         where  v_3 = s2 + u

    The energy E is minus the logarithm of the product of these densities. "To explain best" means
    to minimise it:

        E = 1/2 sum_(l=0,1,2) [ |x^l - z R_l|^2 / v_l + d_l log(2 pi v_l) ]
          + 1/2               [ |x^3 - r|^2     / v_3 + H   log(2 pi v_3) ]

Two ways to read
    A read knows only the key. How should E treat the value?
        read=marginal   Only the key counts, so d_0 = |k|. This is the same as averaging over all
                        that the value could be. It is ours, and the default.
        read=joint      E is minimised over the value, too, as by Yoo & Wood. The value is then
                        equal to its prediction, and its squared error is 0. But each of its
                        elements still adds 1/2 log(2 pi v_0), so d_0 = P. (In Yoo & Wood's program,
                        the search moves the value, too. Here, it has its best place at each step.)
    In our runs, a marginal read finds the address. A joint read finds only the direction of z. This
    z is too short, and so is the value that it predicts: on glyphs, it has 71 % of the length of
    the true value. Why? A shorter z makes v_0 smaller, and so d_0 log(2 pi v_0) falls. A shorter z
    also makes the error in the key larger. But log(v_0) counts for all elements of theta, and the
    error only for those of the key, a tenth of them. (Exercise 13 derives how short z becomes.)

What is not exact
    The value that a marginal read recalls has 95 % of its true length. The reason is that a write
    corrects only a share of the error that the prediction of theta had before. This share is
    z U_0 z^T / v_0, with the U_0 from before the write (see `regress`). How large is it? In the
    search of a write, the terms of x^0 are by far the largest ones of E. Apart from a constant,
    their sum is 1/2 [ |error|^2 / v_0 + P log(v_0) ]. It is smallest if v_0 is |error|^2 / P, the
    mean square of the elements of the error. In an unused direction, the prediction is near 0, so
    the error is about theta itself. On glyphs, its mean square is 25 s2. So v_0 = s2 + z U_0 z^T is
    about 25 s2, and the share is 24/25, or 96 %, which is about what we measured.

    Also, the hidden layers are only one guess. Yoo & Wood can keep many guesses, each with a belief
    of its own. They call such a guess, together with its belief, a particle. So ours is BayesPCN
    with one particle.

The upper layers
    The upper layers hardly matter. The search of a write leaves x^2 and x^3 near 0, so W_1 and W_2
    learn almost nothing, and with layers=2, recall is equally good. We have four layers because the
    paper has.
"""
import math

import torch
from torch.nn.functional import gelu

import data


class BayesPCN:
    """A memory for about `hidden` vectors theta of `dim` elements.

    As in the paper (A.2): 4 layers, GELU, and for reads, 500 steps of Adam with a learning rate of
    0.01. For the rest, the paper takes the defaults that Yoo & Wood describe. We take those of
    their program: a width of 256, and the two sigmas. A write searches as a read does.
    A search has at most `steps` steps, and ends earlier when E hardly changes, as in their program.
    Three things differ from the paper: the default read is our own, the learning rate falls during
    a search, and a write needs no learning rate for weights, because it updates them in closed
    form.

    seed: for the random numbers of this class. It has nothing to do with the seeds of til.py.
    The attribute trace has E at each step of the last search.
    Raises Mistake for an option out of range.
    """

    def __init__(self, dim, hidden=256, layers=4, sigma_prior=1.0, sigma_obs=0.01, lr=0.01,
                 steps=500, read="marginal", seed=0):
        if read not in ("marginal", "joint"):
            raise data.Mistake(f"bayespcn: read can be marginal or joint, not {read}")
        if hidden < 1 or layers < 2 or steps < 1 or seed < 0:
            raise data.Mistake("bayespcn: hidden and steps must be at least 1, layers at least 2, "
                               "and seed at least 0")
        if not min(sigma_prior, sigma_obs, lr) > 0:
            raise data.Mistake("bayespcn: sigma_prior, sigma_obs and lr must be above 0")
        self.dim = dim
        self.H = hidden
        self.layers = layers
        self.lr = lr
        self.steps = steps
        self.read_mode = read
        self.seed = seed
        self.s2 = sigma_obs ** 2
        self.n_written = 0
        # The belief before the first write: the means are small random numbers. All is float64,
        # because float32 is too coarse: |E| reaches 60,000 on glyphs, and a search ends when E
        # changes by less than 0.001.
        widths = [dim] + [hidden] * (layers - 2)                            # of x^0, x^1, x^2
        self.R = [self.noise(l, hidden, width) for l, width in enumerate(widths)]   # (H, width)
        self.U = [sigma_prior ** 2 * torch.eye(hidden, dtype=torch.float64) for _ in widths]
        self.r = self.noise(layers - 1, 1, hidden)[0]
        self.u = sigma_prior ** 2

    def write(self, key, value):
        """Stores theta = key (+) value."""
        theta = torch.cat([key, value]).double()                    # (P,)
        # `stream` says at which random numbers the search begins: new ones for each write.
        hidden = self.search(theta, self.dim, stream=self.layers + 1 + self.n_written)
        self.update([theta, *hidden])

    def read(self, key):
        """The key (|k|,) -> theta_hat (P,)."""
        # In a joint read, the elements of the value count, although their squared error is 0.
        d_0 = len(key) if self.read_mode == "marginal" else self.dim
        hidden = self.search(key.double(), d_0, stream=self.layers)
        x1 = hidden[0]
        value = gelu(x1) @ self.R[0][:, len(key):]                  # the prediction z R_0
        return torch.cat([key, value.to(key.dtype)])

    # ---- how an observation changes the belief: Bayes' rule ------------------------------------
    def update(self, x):
        """Changes the belief after one observation of all layers, x = [x^0 (P,), x^1 (H,), ..]."""
        for l in range(self.layers - 1):
            self.regress(l, gelu(x[l + 1]), x[l])
        # At the top, precisions (1 / variance) add up, and the new mean is weighted by them.
        u = 1 / (1 / self.u + 1 / self.s2)
        self.r = u * (self.r / self.u + x[-1] / self.s2)
        self.u = u
        self.n_written += 1

    def regress(self, l, z, y):
        """Bayesian linear regression: changes the belief about W_l after y = z W_l + noise.

        The precision U_l^-1 grows by outer(z, z) / s2. The formula of Sherman and Morrison says how
        U_l changes then, without an inverse.
        """
        R = self.R[l]
        U = self.U[l]
        Uz = U @ z                                                  # (H,)
        gain = Uz / (self.s2 + z @ Uz)                              # (H,)
        error = y - z @ R                                           # of the prediction
        R.addr_(gain, error)                                        # R += outer(gain, error)
        U.addr_(gain, Uz, alpha=-1)                                 # U -= outer(gain, Uz)

    # ---- how the hidden layers are found: gradient descent on E --------------------------------
    @torch.enable_grad()                        # also if the caller has switched gradients off
    def search(self, x0, d_0, stream):
        """The hidden layers x^1, x^2, x^3 (3, H) at which a search for the minimum of E ends.

        x0 is theta (P,), or a key (|k|,). The search begins at the random numbers of `stream` (see
        `noise`).
        """
        hidden = self.noise(stream, self.layers - 1, self.H).requires_grad_()
        squared_error_0 = self.make_squared_error(x0)
        adam = torch.optim.Adam([hidden], self.lr)
        # With a constant learning rate, E would jump around its minimum, and hardly ever settle.
        schedule = torch.optim.lr_scheduler.LambdaLR(adam, self.decay)
        self.trace = []
        # The matrices are small: with more threads, most of the time would be spent on waiting.
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        for step in range(self.steps):
            E = self.energy(hidden, squared_error_0, d_0)
            self.trace.append(E.item())
            if step > 0 and abs(self.trace[-1] - self.trace[-2]) < 1e-3:
                break
            adam.zero_grad()
            E.backward()                        # with respect to the hidden layers
            adam.step()
            schedule.step()
        torch.set_num_threads(threads)
        return hidden.detach()

    def decay(self, step):
        """The factor of the learning rate: 1 for 30 % of the steps, then a straight line to 0."""
        return min(1, (1 - step / self.steps) / 0.7)

    def energy(self, hidden, squared_error_0, d_0):
        """E for the hidden layers x^1, x^2, x^3 (3, H). The sum begins at the top layer.

        squared_error_0(z) is |x^0 - z R_0|^2 over what is known of x^0. d_0 says how many elements
        of x^0 count.
        """
        x = [None, *hidden]                                         # so x[l] is x^l
        top = self.layers - 1
        v = torch.tensor(self.s2 + self.u, dtype=torch.float64)     # a tensor, for torch.log
        E = minus_log_normal((x[top] - self.r).square().sum(), v, self.H)
        for l in reversed(range(top)):                              # x^(l+1) predicts x^l
            z = gelu(x[l + 1])
            v = self.s2 + z @ self.U[l] @ z
            if l == 0:
                E = E + minus_log_normal(squared_error_0(z), v, d_0)
            else:
                squared_error = (x[l] - z @ self.R[l]).square().sum()
                E = E + minus_log_normal(squared_error, v, self.H)
        return E

    def make_squared_error(self, x0):
        """Makes the function z -> |x0 - z R|^2, where R are the columns of R_0 that predict x0.

        Speed: multiplied out, this is x0 x0^T - 2 z R x0^T + z R R^T z^T. What does not depend on z
        is computed once for a whole search. So a step takes O(H^2) operations, not O(H |x0|).
        """
        R = self.R[0][:, :len(x0)]
        x0_x0 = x0 @ x0
        R_x0 = R @ x0                                               # (H,)
        R_R = R @ R.T                                               # (H, H)
        return lambda z: x0_x0 - 2 * z @ R_x0 + z @ R_R @ z

    def noise(self, stream, rows, width):
        """Random numbers (rows, width), such that each row has a length of about 1.

        Each stream has its own numbers. With 4 layers, 0 to 3 are for the first belief about each
        layer, all reads begin at those of 4, and write n = 0, 1, .. begins at those of 5 + n.
        """
        x = torch.randn(rows, width, generator=data.generator(self.seed, stream))
        return x.double() / math.sqrt(width)

    @property
    def nbytes(self):
        """The size of R, U and r in bytes."""
        return sum(x.nbytes for x in (*self.R, *self.U, self.r))


def minus_log_normal(squared_error, v, d):
    """-log N(x; m, v I), for x and m with d elements, where squared_error = |x - m|^2."""
    return (squared_error / v + d * torch.log(2 * math.pi * v)) / 2
