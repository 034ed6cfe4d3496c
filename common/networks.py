"""Networks (flax.linen) and the action distributions of their policies.

Shapes: obs (..., obs_dim), or images (..., H, W, C) where there is an encoder; continuous actions (..., action_dim) in
[-1, 1], discrete actions (...,) integers; leading axes are free. An ensemble's axis comes first: a Critic returns
(num_critics, ...).

A policy is a network that returns a distribution with `sample(key)`, `log_prob(action)` (summed over the action's
dimensions), `mode()` and `entropy()`. An algorithm that needs no more works with discrete and continuous actions.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

# --- Distributions -------------------------------------------------------------------------------------


class Normal(NamedTuple):
    """Independent Gaussians of the action's dimensions."""

    mean: jax.Array  # (..., action_dim)
    log_std: jax.Array  # (..., action_dim)

    def mode(self):
        return self.mean

    def sample(self, key):
        return self.mean + jnp.exp(self.log_std) * jax.random.normal(key, self.mean.shape)

    def log_prob(self, action):
        z = (action - self.mean) * jnp.exp(-self.log_std)
        return -(0.5 * z**2 + self.log_std + 0.5 * jnp.log(2 * jnp.pi)).sum(axis=-1)

    def entropy(self):
        return (self.log_std + 0.5 * jnp.log(2 * jnp.pi * jnp.e)).sum(axis=-1)


class TanhNormal(NamedTuple):
    """tanh(u) of a Gaussian u (SAC, https://arxiv.org/abs/1812.05905, appendix C).

    Its entropy has no closed form: minus the log-probability of a sample estimates it without bias.
    """

    mean: jax.Array  # (..., action_dim), of u
    log_std: jax.Array  # (..., action_dim), of u

    def mode(self):
        return jnp.tanh(self.mean)  # of the mean, as every implementation has it; the density's peak is elsewhere

    def sample(self, key):
        return jnp.tanh(Normal(*self).sample(key))

    def sample_and_log_prob(self, key):
        u = Normal(*self).sample(key)
        return jnp.tanh(u), self._log_prob_of_u(u)

    def log_prob(self, action):
        limit = 1 - 1e-5  # an action on the bound has u = infinity
        return self._log_prob_of_u(jnp.arctanh(jnp.clip(action, -limit, limit)))

    def _log_prob_of_u(self, u):
        # log(1 - tanh(u)^2), in the form that does not cancel for large |u|
        log_slope = 2 * (jnp.log(2.0) - u - nn.softplus(-2 * u))
        return Normal(*self).log_prob(u) - log_slope.sum(axis=-1)


class Categorical(NamedTuple):
    """Discrete actions 0 .. n - 1."""

    logits: jax.Array  # (..., n)

    def mode(self):
        return self.logits.argmax(axis=-1)

    def sample(self, key):
        return jax.random.categorical(key, self.logits)

    def log_prob(self, action):
        return select(nn.log_softmax(self.logits), action)

    def entropy(self):
        log_p = nn.log_softmax(self.logits)
        return -(jnp.exp(log_p) * log_p).sum(axis=-1)


def select(values, action):
    """values[..., action]: (..., n) at integers (...,) -> (...,)."""
    return jnp.take_along_axis(values, action[..., None], axis=-1).squeeze(axis=-1)


# --- Layers --------------------------------------------------------------------------------------------

GLOROT = {"glorot": 1.0, "glorot/100": 0.01}


class Dense(nn.Module):
    """A linear layer with the initialisation of a reference implementation.

    "orthogonal": kernel orthogonal times sqrt(2), bias 0 (jaxrl, IQL). "torch": both uniform in +-1 / sqrt(inputs)
    (PyTorch's nn.Linear: TD3, TD3+BC). "edac": that kernel, bias 0.1 (EDAC's hidden layers, ReBRAC's). "lecun": flax's
    default. "mbpo": kernel normal with deviation 1 / (2 sqrt(inputs)), cut at twice it, bias 0 (MBPO's dynamics, as
    TensorFlow cuts it). "glorot": kernel uniform with variance 2 / (inputs + outputs), bias 0; "glorot/100": of a
    hundredth of that variance (OGBench's layers, and its actors' last one). A number: both uniform within it.
    """

    features: int
    initializer: str | float = "orthogonal"

    @nn.compact
    def __call__(self, x, mask=None):  # mask: (inputs, features), of the kernel's entries that are used
        bias = nn.initializers.zeros
        if self.initializer == "orthogonal":
            kernel = _alone(nn.initializers.orthogonal(2**0.5))
        elif self.initializer == "torch":
            kernel = bias = _uniform(x.shape[-1] ** -0.5)
        elif self.initializer == "edac":
            kernel, bias = _uniform(x.shape[-1] ** -0.5), nn.initializers.constant(0.1)
        elif self.initializer == "lecun":
            kernel = _alone(nn.initializers.lecun_normal())
        elif self.initializer == "mbpo":
            kernel = _alone(nn.initializers.truncated_normal(0.5 * x.shape[-1] ** -0.5))
        elif self.initializer in ("glorot", "glorot/100"):
            kernel = _alone(nn.initializers.variance_scaling(GLOROT[self.initializer], "fan_avg", "uniform"))
        elif isinstance(self.initializer, float):
            kernel = bias = _uniform(self.initializer)
        else:
            raise ValueError(
                "initializer is 'orthogonal', 'torch', 'edac', 'lecun', 'mbpo', 'glorot' or 'glorot/100', "
                f"not {self.initializer!r}"
            )

        def masked_dot(x, kernel, *args, **kwargs):
            return jax.lax.dot_general(x, kernel * mask, *args, **kwargs)

        dot = None if mask is None else masked_dot
        return nn.Dense(self.features, kernel_init=kernel, bias_init=bias, dot_general=dot, name="linear")(x)


def _uniform(bound):
    return _alone(lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound))


def _alone(initializer):
    """The initializer, one array at a time also under vmap (ensembles, seeds).

    On a CPU, JAX 0.10's batched QR waits for threads of the pool that other QRs of the same program hold, and all of
    them wait for ever. Batched random numbers take several times as long to compile.
    """

    def init(key, shape, dtype):
        return jax.custom_batching.sequential_vmap(lambda key: initializer(key, shape, dtype))(key)

    return init


class Encoder(nn.Module):
    """Convolutions with ReLU: images (..., H, W, C) of numbers from 0 to `high`, by which they are divided -> (..., n).

    No padding; kernels and biases are uniform in +-1 / sqrt(inputs of a unit), as PyTorch has it, and Torch had it when
    DQN was written. A critic's ensemble shares one; networks that are trained apart have one each.
    """

    layers: Sequence[tuple[int, int, int]]  # (filters, width of the kernel, stride)
    high: float = 255.0

    @nn.compact
    def __call__(self, image):
        x = image.astype(jnp.float32) / self.high
        for filters, width, stride in self.layers:
            init = _uniform((width * width * x.shape[-1]) ** -0.5)
            options = {"padding": "VALID", "kernel_init": init, "bias_init": init, "conv_general_dilated": _by_patches}
            x = nn.relu(nn.Conv(filters, (width, width), stride, **options)(x))
        return x.reshape(*x.shape[:-3], -1)


def _by_patches(x, kernel, strides, *_, **__):
    """The convolution without padding of x (n, H, W, C) and a kernel (w, w, C, filters), for nn.Conv: each patch of an
    image becomes a row, and the rows are multiplied with the kernel.

    A kernel's gradient is a product of matrices then. XLA's own convolution takes far longer for it on a CPU, and more
    than for all the rest of an update; under vmap, each run would be a group of its channels.
    """
    side, step = kernel.shape[0], strides[0]
    rows, columns = ([slice(i, size - side + i + 1, step) for i in range(side)] for size in x.shape[1:3])
    patches = jnp.concatenate([x[:, i, j] for i in rows for j in columns], axis=-1)
    return patches @ kernel.reshape(-1, kernel.shape[-1])


ENCODERS = {  # a Config's `encoder`, and the layers that it names
    "minatar": ((16, 3, 1),),  # of MinAtar's DQN, https://github.com/kenjyoung/MinAtar at 4241f24, examples/dqn.py
    "nature": ((32, 8, 4), (64, 4, 2), (64, 3, 1)),  # of DQN, https://www.nature.com/articles/nature14236
}


def random_shift(key, images, pad):
    """Each image of a batch (n, H, W, C), or stack (n, H, W, k C), moved by up to `pad` pixels along H and along W.

    DrQ's augmentation (https://arxiv.org/abs/2004.13649): `pad` copies of the outermost pixels are put round an image,
    and a part of its own size is cut out of that, each of the (2 pad + 1)^2 places with the same probability. Every row
    has a place of its own, and a stack is moved as one image. The numbers stay what they are, as bytes do.
    """
    padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)), mode="edge")
    corner = jax.random.randint(key, (len(images), 2), 0, 2 * pad + 1)

    def cut(image, corner):
        return jax.lax.dynamic_slice(image, (corner[0], corner[1], 0), images.shape[1:])

    return jax.vmap(cut)(padded, corner)


def image_encoder(name, spec, shift=None):
    """The Encoder that a Config names for the images of a Spec; None for vectors, which need none ("identity").

    shift: the pixels by which random_shift may move the images, to be refused where it cannot.
    """
    if not spec.obs_shape and shift is not None:
        raise SystemExit("These observations are vectors, which cannot be shifted: leave out --random-shift.")
    if not spec.obs_shape and name != "identity":
        raise SystemExit(f"These observations are vectors, which {name} cannot take: leave out --encoder.")
    if spec.obs_shape and name == "identity":
        raise SystemExit(
            "These observations are images: say --encoder nature (36 x 36 or more) or minatar (small ones)."
        )
    if not spec.obs_shape:
        return None
    left = least = np.array(spec.obs_shape[:2])
    for _, width, stride in ENCODERS[name]:
        left = (left - width) // stride + 1
        least = np.minimum(left, least)
    if least.min() < 1:
        size = f"{spec.obs_shape[0]} x {spec.obs_shape[1]}"
        raise SystemExit(f"Images of {size} are too small for the encoder {name}: say --encoder minatar.")
    if shift is not None and not 0 < shift < min(spec.obs_shape[:2]):
        most = min(spec.obs_shape[:2]) - 1
        raise SystemExit(f"random_shift must be from 1 to {most} pixels for these images, not {shift}, or left out.")
    return Encoder(ENCODERS[name], float(spec.obs_high))


class MLP(nn.Module):
    """Hidden layers with ReLU (LayerNorm before or after it), then a linear layer: (..., inputs) -> (..., outputs).

    `activation` stands in the place of the ReLU. An `encoder` of images comes before the first layer.
    """

    outputs: int
    hidden: Sequence[int] = (256, 256)
    initializer: str = "orthogonal"
    layer_norm: bool = False
    relu_first: bool = False  # LayerNorm after the ReLU
    output_bound: float | str | None = None  # initializer of the last layer, where it is another one
    activation: Callable = nn.relu
    encoder: Encoder | None = None

    @nn.compact
    def __call__(self, x):
        x = x if self.encoder is None else self.encoder(x)
        for features in self.hidden:
            x = Dense(features, self.initializer)(x)
            norm = nn.LayerNorm() if self.layer_norm else (lambda x: x)
            x = norm(self.activation(x)) if self.relu_first else self.activation(norm(x))
        return Dense(self.outputs, self.output_bound or self.initializer)(x)


# --- Policies ------------------------------------------------------------------------------------------


class GaussianActor(nn.Module):
    """A Gaussian round a tanh mean, with one learned standard deviation per dimension, the same in every state.

    The policy of IQL's reference. It is not squashed: data actions on the bounds have a finite density, and its mode is
    within them.
    """

    action_dim: int
    hidden: Sequence[int] = (256, 256)
    initializer: str = "orthogonal"
    encoder: Encoder | None = None

    @nn.compact
    def __call__(self, obs):
        mean = jnp.tanh(MLP(self.action_dim, self.hidden, self.initializer, encoder=self.encoder)(obs))
        log_std = self.param("log_std", nn.initializers.zeros, (self.action_dim,))
        return Normal(mean, jnp.broadcast_to(jnp.clip(log_std, -5.0, 2.0), mean.shape))


class TanhGaussianActor(nn.Module):
    """A tanh-squashed Gaussian whose mean and standard deviation depend on the state (SAC)."""

    action_dim: int
    hidden: Sequence[int] = (256, 256)
    initializer: str = "torch"
    log_std_min: float = -20.0
    log_std_max: float = 2.0

    @nn.compact
    def __call__(self, obs):
        mean, log_std = jnp.split(MLP(2 * self.action_dim, self.hidden, self.initializer)(obs), 2, axis=-1)
        return TanhNormal(mean, jnp.clip(log_std, self.log_std_min, self.log_std_max))


class DeterministicActor(nn.Module):
    """One action per state, in [-1, 1]: (..., obs_dim) -> (..., action_dim)."""

    action_dim: int
    hidden: Sequence[int] = (256, 256)
    initializer: str = "torch"
    output_bound: float | None = None
    encoder: Encoder | None = None

    @nn.compact
    def __call__(self, obs):
        options = {"output_bound": self.output_bound, "encoder": self.encoder}
        return jnp.tanh(MLP(self.action_dim, self.hidden, self.initializer, **options)(obs))


class CategoricalActor(nn.Module):
    """A softmax over discrete actions; `action_dim` is their number."""

    action_dim: int
    hidden: Sequence[int] = (256, 256)
    initializer: str = "orthogonal"
    encoder: Encoder | None = None

    @nn.compact
    def __call__(self, obs):
        return Categorical(MLP(self.action_dim, self.hidden, self.initializer, encoder=self.encoder)(obs))


# --- Sequences: networks that read a part of an episode -----------------------------------------------------


class CausalTransformer(nn.Module):
    """GPT-2's blocks (Radford et al., 2019): (..., n, width) -> the same shape, of which output i reads inputs 0 .. i.

    Each number of `hidden` is a block: attention, then a hidden layer of so many ReLUs, each behind a LayerNorm and
    added to its input. There is no embedding of positions: the inputs have theirs.
    """

    hidden: Sequence[int] = (512, 512, 512)
    num_heads: int = 1
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x, train=False):
        width, kernel = x.shape[-1], {"kernel_init": _alone(nn.initializers.normal(0.02))}
        options = {"broadcast_dropout": False, "deterministic": not train, **kernel}
        drop, mask = nn.Dropout(self.dropout, deterministic=not train), nn.make_causal_mask(x[..., 0])
        x = drop(x)
        for features in self.hidden:
            attention = nn.MultiHeadDotProductAttention(self.num_heads, dropout_rate=self.dropout, **options)
            x = x + drop(attention(nn.LayerNorm(epsilon=1e-5)(x), mask=mask))
            y = nn.relu(nn.Dense(features, **kernel)(nn.LayerNorm(epsilon=1e-5)(x)))
            x = x + drop(nn.Dense(width, **kernel)(y))
        return nn.LayerNorm(epsilon=1e-5)(x)


class DecisionTransformer(nn.Module):
    """Actions of k steps from (return to go, obs, action) of each (https://arxiv.org/abs/2106.01345).

    obs (..., k, obs_dim), action (..., k, action_dim) or (..., k), return_to_go and timestep (..., k) -> actions
    (..., k, action_dim) in [-1, 1] or, of `discrete` ones, logits. The action of step i reads the returns and the
    observations of steps 0 .. i and the actions before it. Timesteps from max_timestep on are not told apart.
    """

    action_dim: int
    embed_dim: int = 128
    hidden: Sequence[int] = (512, 512, 512)
    num_heads: int = 1
    max_timestep: int = 1000
    dropout: float = 0.0
    discrete: bool = False

    @nn.compact
    def __call__(self, obs, action, return_to_go, timestep, train=False):
        action = nn.one_hot(action, self.action_dim) if self.discrete else action
        time = nn.Embed(self.max_timestep, self.embed_dim, embedding_init=_alone(nn.initializers.normal(1.0)))
        tokens = [Dense(self.embed_dim, "torch")(x) for x in (return_to_go[..., None], obs, action)]
        x = jnp.stack(tokens, axis=-2) + time(jnp.minimum(timestep, self.max_timestep - 1))[..., None, :]
        x = nn.LayerNorm(epsilon=1e-5)(x)  # (..., k, 3, embed_dim)
        flat = x.reshape(*x.shape[:-3], -1, self.embed_dim)
        flat = CausalTransformer(self.hidden, self.num_heads, self.dropout)(flat, train)
        outputs = Dense(self.action_dim, "torch")(flat.reshape(x.shape)[..., 1, :])
        return outputs if self.discrete else jnp.tanh(outputs)


# --- Behaviour models: generative models of the data's actions ------------------------------------------------


class VAE(nn.Module):
    """A conditional variational auto-encoder of actions (BCQ, https://arxiv.org/abs/1812.02900, appendix).

    `vae.apply(params, obs, z, method="decode")` calls one of its halves. A prior sample is decode(obs, z), z ~ N(0, 1).
    """

    action_dim: int
    latent_dim: int
    hidden: Sequence[int] = (750, 750)
    initializer: str = "torch"

    def setup(self):
        self.encoder = MLP(2 * self.latent_dim, self.hidden, self.initializer)
        self.decoder = MLP(self.action_dim, self.hidden, self.initializer)

    def __call__(self, obs, action, key):
        """The reconstructed action, and the posterior q(z | s, a) that its latent was drawn from."""
        posterior = self.encode(obs, action)
        return self.decode(obs, posterior.sample(key)), posterior

    def encode(self, obs, action):
        mean, log_std = jnp.split(self.encoder(jnp.concatenate([obs, action], axis=-1)), 2, axis=-1)
        return Normal(mean, jnp.clip(log_std, -4.0, 15.0))

    def decode(self, obs, z):
        return jnp.tanh(self.decode_unsquashed(obs, z))

    def decode_unsquashed(self, obs, z):
        """The action before the tanh."""
        return self.decoder(jnp.concatenate([obs, z], axis=-1))


class AutoregressiveActor(nn.Module):
    """p(a | s) = prod_j p(a_j | s, a_1 .. a_{j-1}), each factor a histogram of equal bins on [-1, 1] (EMaQ).

    One masked MLP (MADE, https://arxiv.org/abs/1502.03509) computes all factors. A unit of degree m depends on obs and
    a_1 .. a_m alone, since it reads units of no larger degree: obs has degree 0, a_k degree k, the logits of a_j j - 1.
    """

    action_dim: int
    bins: int = 40
    hidden: Sequence[int] = (256, 256)
    initializer: str = "torch"

    @nn.compact
    def __call__(self, obs, action):
        """Logits of the bins: (..., action_dim, bins)."""
        x = jnp.concatenate([obs, action], axis=-1)
        degree = np.concatenate([np.zeros(obs.shape[-1], int), 1 + np.arange(self.action_dim)])
        for features in self.hidden:
            degree, degree_in = np.arange(features) % self.action_dim, degree
            x = nn.relu(Dense(features, self.initializer)(x, degree_in[:, None] <= degree[None]))
        degree, degree_in = np.repeat(np.arange(self.action_dim), self.bins), degree
        logits = Dense(len(degree), self.initializer)(x, degree_in[:, None] <= degree[None])
        return logits.reshape(*logits.shape[:-1], self.action_dim, self.bins)

    def log_prob(self, obs, action):
        index = jnp.clip(jnp.floor((action + 1) / 2 * self.bins).astype(int), 0, self.bins - 1)
        log_density = nn.log_softmax(self(obs, action)) - jnp.log(2 / self.bins)  # probability / width of a bin
        return select(log_density, index).sum(axis=-1)

    def sample(self, obs, key):
        """A bin and a uniform point inside it, one dimension after another: action_dim passes."""
        action = jnp.zeros((*obs.shape[:-1], self.action_dim))
        for j in range(self.action_dim):
            key, key_bin, key_inside = jax.random.split(key, 3)
            index = jax.random.categorical(key_bin, self(obs, action)[..., j, :])
            inside = jax.random.uniform(key_inside, index.shape)
            action = action.at[..., j].set((index + inside) * 2 / self.bins - 1)
        return action


# --- Flows ---------------------------------------------------------------------------------------------


class Velocity(nn.Module):
    """Velocity of a flow at the point x of action space and the time t (FQL, https://arxiv.org/abs/2502.02538).

    (..., obs_dim), (..., action_dim), (..., 1) -> (..., action_dim): the inputs are joined, the time as the number that
    it is. Without a time it is FQL's one-step policy: the action, which is not squashed, at an observation and noise.
    The layers are those of its code (https://github.com/seohongpark/fql at 719d044): GELU in its tanh form, no norm.
    """

    action_dim: int
    hidden: Sequence[int] = (256, 256)

    @nn.compact
    def __call__(self, obs, x, *time):
        network = MLP(self.action_dim, self.hidden, "glorot", activation=nn.gelu)
        return network(jnp.concatenate([obs, x, *time], axis=-1))


# --- Values --------------------------------------------------------------------------------------------


class Value(nn.Module):
    """V(s): (..., obs_dim) -> (...)."""

    hidden: Sequence[int] = (256, 256)
    initializer: str = "orthogonal"
    layer_norm: bool = False
    relu_first: bool = False
    activation: Callable = nn.relu
    encoder: Encoder | None = None

    @nn.compact
    def __call__(self, obs):
        options = self.initializer, self.layer_norm, self.relu_first, None, self.activation, self.encoder
        return MLP(1, self.hidden, *options)(obs).squeeze(axis=-1)


class Critic(nn.Module):
    """An ensemble of Q(s, a), independent but for their inputs: (num_critics, ...)."""

    num_critics: int = 2
    hidden: Sequence[int] = (256, 256)
    initializer: str = "orthogonal"
    layer_norm: bool = False
    relu_first: bool = False
    output_bound: float | None = None
    activation: Callable = nn.relu
    encoder: Encoder | None = None  # one for all members

    @nn.compact
    def __call__(self, obs, action):
        obs = obs if self.encoder is None else self.encoder(obs)
        x = jnp.concatenate([obs, action], axis=-1)
        options = self.initializer, self.layer_norm, self.relu_first, self.output_bound, self.activation
        return _ensemble(self.num_critics)(1, self.hidden, *options)(x).squeeze(axis=-1)


class DiscreteCritic(nn.Module):
    """An ensemble of Q(s, .) over discrete actions, at the given ones: (num_critics, ...).

    Called without an action it returns all of them: (num_critics, ..., action_dim).
    """

    action_dim: int
    num_critics: int = 2
    hidden: Sequence[int] = (256, 256)
    initializer: str = "orthogonal"
    encoder: Encoder | None = None  # one for all members

    @nn.compact
    def __call__(self, obs, action=None):
        obs = obs if self.encoder is None else self.encoder(obs)
        q = _ensemble(self.num_critics)(self.action_dim, self.hidden, self.initializer)(obs)
        return q if action is None else select(q, jnp.broadcast_to(action, q.shape[:-1]))


# --- Goals: the networks of OGBench (https://github.com/seohongpark/ogbench at 1d41409, utils/networks.py) ------------
# Hidden layers are GELU in its tanh form and then, but in the actor, LayerNorm. Inputs are joined in the order given.


def _goal_options(norm=True):
    return {"initializer": "glorot", "layer_norm": norm, "relu_first": True, "activation": nn.gelu}


class GoalActor(nn.Module):
    """A policy of (obs, goal): a Gaussian of deviation 1, or over discrete actions a softmax.

    The Gaussian's log-likelihood is half a squared error. Its mean is not squashed: clip it to act.
    """

    action_dim: int
    hidden: Sequence[int] = (256, 256)
    discrete: bool = False

    @nn.compact
    def __call__(self, *inputs):
        options = _goal_options(norm=False) | {"output_bound": "glorot/100"}
        outputs = MLP(self.action_dim, self.hidden, **options)(jnp.concatenate(inputs, axis=-1))
        return Categorical(outputs) if self.discrete else Normal(outputs, jnp.zeros_like(outputs))


class GoalValue(nn.Module):
    """An ensemble of functions of (obs, goal) or (obs, goal, action): (num_members, ...). Discrete actions: one-hot."""

    num_members: int = 2
    hidden: Sequence[int] = (256, 256)

    @nn.compact
    def __call__(self, *inputs):
        network = _ensemble(self.num_members)(1, self.hidden, **_goal_options())
        return network(jnp.concatenate(inputs, axis=-1)).squeeze(axis=-1)


class GoalEncoder(nn.Module):
    """A vector (..., outputs) of the joint inputs, of length sqrt(outputs) if `normalized` (HIQL's goals)."""

    outputs: int
    hidden: Sequence[int] = (256, 256)
    normalized: bool = False

    @nn.compact
    def __call__(self, *inputs):
        x = MLP(self.outputs, self.hidden, **_goal_options())(jnp.concatenate(inputs, axis=-1))
        return sphere(x) if self.normalized else x


def sphere(x):
    """x (..., n) scaled to length sqrt(n)."""
    return x * x.shape[-1] ** 0.5 / jnp.linalg.norm(x, axis=-1, keepdims=True)


class Bilinear(nn.Module):
    """An ensemble of phi(obs, action) . psi(goal) / sqrt(latent_dim) (CRL): (num_members, ...).

    `method="pairs"` compares each of n rows with each of m goals: (num_members, n, m).
    """

    num_members: int = 2
    hidden: Sequence[int] = (256, 256)
    latent_dim: int = 512

    def setup(self):
        network = _ensemble(self.num_members)
        self.phi, self.psi = (network(self.latent_dim, self.hidden, **_goal_options()) for _ in range(2))

    def __call__(self, goal, *inputs):
        phi, psi = self.phi(jnp.concatenate(inputs, axis=-1)), self.psi(goal)
        return (phi * psi).sum(axis=-1) / self.latent_dim**0.5

    def pairs(self, goal, *inputs):
        phi, psi = self.phi(jnp.concatenate(inputs, axis=-1)), self.psi(goal)
        return jnp.einsum("enk,emk->enm", phi, psi) / self.latent_dim**0.5


class Quasimetric(nn.Module):
    """d(x, y) >= 0 of two states, with d(x, x) = 0 and the triangle inequality, but not symmetric (QRL).

    `method="encode"` maps observations to latent vectors (..., latent_dim), `method="between"` two of these to their
    distance. "iqe": a learned mean of the mean and the maximum of `interval_union`; "mrn": see `metric_residual`.
    """

    hidden: Sequence[int] = (256, 256)
    latent_dim: int = 512
    kind: str = "iqe"
    component_dim: int = 8  # intervals of one component of IQE; it divides latent_dim

    def setup(self):
        self.phi = MLP(self.latent_dim, self.hidden, **_goal_options())
        self.alpha = self.param("alpha", nn.initializers.zeros, ()) if self.kind == "iqe" else None

    def __call__(self, x, y):
        return self.between(self.phi(x), self.phi(y))

    def encode(self, x):
        return self.phi(x)

    def between(self, x, y):
        if self.kind == "mrn":
            return metric_residual(x, y)
        x, y = (z.reshape(*z.shape[:-1], -1, self.component_dim) for z in (x, y))
        components, share = interval_union(x, y), nn.sigmoid(self.alpha)
        return share * components.mean(axis=-1) + (1 - share) * components.max(axis=-1)


def interval_union(x, y):
    """Length of the union of the intervals [x_j, y_j], j = 1 .. n, with x_j < y_j: (..., n), (..., n) -> (...).

    A component of the interval quasimetric embedding (IQE, https://arxiv.org/abs/2211.15120). In the order of their
    starts, each interval adds what lies beyond the ends of those before it.
    """
    order = x.argsort(axis=-1)
    start, end = (jnp.take_along_axis(z, order, axis=-1) for z in (x, y))
    covered = jax.lax.cummax(end, axis=end.ndim - 1)
    covered = jnp.concatenate([start[..., :1], covered[..., :-1]], axis=-1)
    return nn.relu(end - jnp.maximum(start, covered)).sum(axis=-1)


def metric_residual(x, y):
    """The distance of the first halves, plus the largest x_j - y_j > 0 of the others (MRN): (..., n) -> (...)."""
    near, far = jnp.split(x - y, 2, axis=-1)
    return jnp.sqrt(jnp.maximum((near**2).sum(axis=-1), 1e-12)) + nn.relu(far.max(axis=-1))


# --- Diffusion: networks that predict the noise in an action ------------------------------------------------
# Called with obs (..., obs_dim), a noisy action (..., action_dim) and the step t (...) that made it, from 0 on.


def sinusoidal(t, features=16):
    """sin(t f_k) and then cos(t f_k), with f_k from 1 down to 1e-4 in equal ratios: (...) -> (..., features)."""
    frequency = np.float32(10_000) ** -np.linspace(0, 1, features // 2, dtype=np.float32)
    angle = jnp.multiply.outer(t.astype(jnp.float32), frequency)
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


class NoiseMLP(nn.Module):
    """Diffusion-QL's network: an MLP of the noisy action, a small MLP of the sinusoidal step, and obs."""

    action_dim: int
    hidden: Sequence[int] = (256, 256, 256)

    @nn.compact
    def __call__(self, obs, noisy, t):
        time = MLP(16, (32,), "torch", activation=jax.nn.mish)(sinusoidal(t))
        x = jnp.concatenate([noisy, time, obs], axis=-1)
        return MLP(self.action_dim, self.hidden, "torch", activation=jax.nn.mish)(x)


class NoiseResNet(nn.Module):
    """IDQL's network: a residual block for each of `hidden`, of the noisy action, obs and the step.

    The step is told as cosines and sines of learned frequencies, through a small MLP. With `training`, a share
    `dropout` of each block's inputs is 0, by the key "dropout" of `rngs` (flax's own Dropout takes no traced share).
    """

    action_dim: int
    hidden: Sequence[int] = (256, 256, 256)
    dropout: float = 0.0

    @nn.compact
    def __call__(self, obs, noisy, t, training=False):
        frequency = self.param("frequency", _alone(nn.initializers.normal(0.2)), (32,), jnp.float32)
        angle = 2 * jnp.pi * jnp.multiply.outer(t.astype(jnp.float32), frequency)
        time = jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)
        time = MLP(128, (128,), "glorot", activation=jax.nn.mish)(time)
        x = Dense(self.hidden[0], "glorot")(jnp.concatenate([noisy, obs, time], axis=-1))
        for features in self.hidden:
            residual = x if x.shape[-1] == features else Dense(features, "lecun")(x)
            if training:
                keep = jax.random.uniform(self.make_rng("dropout"), x.shape) < 1 - self.dropout
                x = jnp.where(keep, x / (1 - self.dropout), 0.0)
            x = Dense(4 * features, "lecun")(nn.LayerNorm()(x))
            x = residual + Dense(features, "lecun")(jax.nn.mish(x))
        return Dense(self.action_dim, "glorot")(jax.nn.mish(x))


# --- Models of the dynamics ------------------------------------------------------------------------------


class Prediction(NamedTuple):
    """What each member of an ensemble expects of a step."""

    mean: jax.Array  # (members, batch, obs_dim + 1): of the observation's change and, last, of the reward
    log_var: jax.Array  # of the same, a Gaussian without correlations
    terminal: jax.Array | None  # (members, batch): logit of the episode's end, if the model learns it


class Dynamics(nn.Module):
    """An ensemble of Gaussians p(s' - s, r | s, a) (MBPO, https://arxiv.org/abs/1906.08253), independent of each other.

    Called with (batch, ...) it shows every member the same rows, with (members, batch, ...) each its own. Inputs are
    scaled: (x - mean) / std. The log-variance stays between two learned bounds, which it approaches softly.
    """

    num_members: int
    obs_dim: int
    hidden: Sequence[int] = (200, 200, 200, 200)
    learns_terminal: bool = False

    @nn.compact
    def __call__(self, obs, action, mean, std):
        x = jnp.concatenate([obs, action], axis=-1)
        x = (jnp.broadcast_to(x, (self.num_members, *x.shape[-2:])) - mean[None, None]) / std[None, None]
        width = self.obs_dim + 1
        network = _ensemble(self.num_members, in_axes=0)
        outputs = network(2 * width + self.learns_terminal, self.hidden, "mbpo", activation=nn.swish)(x)
        high = self.param("max_log_var", nn.initializers.constant(0.5), (self.num_members, width))[:, None]
        low = self.param("min_log_var", nn.initializers.constant(-10.0), (self.num_members, width))[:, None]
        log_var = high - nn.softplus(high - outputs[..., width : 2 * width])
        log_var = low + nn.softplus(log_var - low)
        return Prediction(outputs[..., :width], log_var, outputs[..., -1] if self.learns_terminal else None)


def _ensemble(size, in_axes=None):
    axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "in_axes": in_axes, "out_axes": 0}
    return nn.vmap(MLP, axis_size=size, **axes)
