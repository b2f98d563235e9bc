from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import Distribution, SquashedDiagGaussianDistribution
from stable_baselines3.common.policies import ActorCriticCnnPolicy, ActorCriticPolicy, MultiInputActorCriticPolicy
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.utils import obs_as_tensor
from torch import nn

from sb3_safe import SAFE
from sb3_safe.parallel_mlp import ParallelMlp, SerialMlp, side_by_side
from sb3_safe.policies import TwinCriticCnnPolicy, TwinCriticMultiInputPolicy, TwinCriticPolicy
from tests.tiny_envs import ACTIONS, OBSERVATIONS

VECTOR, DISCRETE, BOX = OBSERVATIONS["vector"], ACTIONS["discrete"], ACTIONS["box"]
IMAGE = spaces.Box(0, 255, (1, 36, 36), np.uint8)
SMALL: dict[str, Any] = {"net_arch": [16, 8]}


def make(
    policy: type[ActorCriticPolicy],
    observation_space: spaces.Space[Any] = VECTOR,
    action_space: spaces.Space[Any] = DISCRETE,
    seed: int = 0,
    **kwargs: Any,
) -> Any:
    th.manual_seed(seed)
    return policy(observation_space, action_space, lambda _: 1e-3, **(SMALL | kwargs))


def observations(space: spaces.Space[Any] = VECTOR, number: int = 5) -> Any:
    space.seed(0)
    samples = [space.sample() for _ in range(number)]
    if isinstance(space, spaces.Dict):
        return obs_as_tensor({key: np.stack([sample[key] for sample in samples]) for key in space}, "cpu")
    return obs_as_tensor(np.stack(samples), "cpu")


def jolt(policy: nn.Module, scale: float = 0.3) -> None:
    """What training does to a policy: every trainable parameter moves."""
    with th.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * th.randn_like(parameter))


# -- one critic is SB3's policy -------------------------------------------------------------------------------------


@pytest.mark.parametrize("acting", [False, True], ids=["training", "acting"])
@pytest.mark.parametrize(
    ("ours", "sb3", "observation_space", "action_space", "kwargs"),
    [
        pytest.param(TwinCriticPolicy, ActorCriticPolicy, VECTOR, BOX, {}, id="box"),
        pytest.param(TwinCriticPolicy, ActorCriticPolicy, VECTOR, DISCRETE, {}, id="discrete"),
        pytest.param(TwinCriticPolicy, ActorCriticPolicy, VECTOR, ACTIONS["multi_discrete"], {}, id="multi_discrete"),
        pytest.param(TwinCriticPolicy, ActorCriticPolicy, VECTOR, ACTIONS["multi_binary"], {}, id="multi_binary"),
        pytest.param(TwinCriticPolicy, ActorCriticPolicy, VECTOR, BOX, {"use_sde": True}, id="sde"),
        pytest.param(
            TwinCriticPolicy, ActorCriticPolicy, VECTOR, BOX, {"use_sde": True, "squash_output": True}, id="squashed"
        ),
        pytest.param(
            TwinCriticPolicy, ActorCriticPolicy, VECTOR, BOX, {"use_sde": True, "full_std": False}, id="sde-one-std"
        ),
        pytest.param(
            TwinCriticPolicy, ActorCriticPolicy, VECTOR, BOX, {"net_arch": {"pi": [8], "vf": [16, 4]}}, id="two-shapes"
        ),
        pytest.param(TwinCriticPolicy, ActorCriticPolicy, VECTOR, BOX, {"net_arch": []}, id="linear"),
        pytest.param(
            TwinCriticPolicy, ActorCriticPolicy, VECTOR, DISCRETE, {"net_arch": {"pi": [], "vf": [4]}}, id="pi-linear"
        ),
        pytest.param(TwinCriticPolicy, ActorCriticPolicy, VECTOR, DISCRETE, {"activation_fn": nn.PReLU}, id="prelu"),
        pytest.param(TwinCriticPolicy, ActorCriticPolicy, VECTOR, DISCRETE, {"ortho_init": False}, id="no-ortho"),
        pytest.param(
            TwinCriticMultiInputPolicy, MultiInputActorCriticPolicy, OBSERVATIONS["dict"], DISCRETE, {}, id="dict"
        ),
        pytest.param(TwinCriticCnnPolicy, ActorCriticCnnPolicy, IMAGE, DISCRETE, {}, id="image"),
        pytest.param(
            TwinCriticCnnPolicy, ActorCriticCnnPolicy, IMAGE, BOX, {"share_features_extractor": False}, id="image-twice"
        ),
    ],
)
def test_with_one_critic_it_is_the_policy_of_sb3(
    ours: Any,
    sb3: Any,
    observation_space: spaces.Space[Any],
    action_space: spaces.Space[Any],
    kwargs: dict[str, Any],
    acting: bool,
):
    mine = make(ours, observation_space, action_space, n_critics=1, **kwargs)
    theirs = make(sb3, observation_space, action_space, **kwargs)
    obs = observations(observation_space)
    results = []
    for policy in (mine, theirs):
        policy.set_training_mode(not acting)
        th.manual_seed(1)
        if policy.use_sde:
            policy.reset_noise(5)
        with th.set_grad_enabled(not acting):
            actions, values, log_prob = policy(obs)
            evaluated = policy.evaluate_actions(obs, actions)
            mean = policy.get_distribution(obs).mode()
            bootstrap = policy.predict_values(obs)
            predicted = [policy._predict(obs), policy._predict(obs, deterministic=True)]
            best = policy(obs, deterministic=True)[0]
        results.append([actions, values, log_prob, *evaluated, mean, bootstrap, *predicted, best])
    for a, b in zip(*results, strict=True):
        if a is None or b is None:
            assert a is b
        else:
            assert a.shape == b.shape
            np.testing.assert_allclose(a.detach().numpy(), b.detach().numpy(), atol=1e-5)
    assert sum(p.numel() for p in mine.parameters()) == sum(p.numel() for p in theirs.parameters())


def test_a_second_critic_changes_neither_actor_nor_first_critic():
    one, three = (make(TwinCriticPolicy, n_critics=n) for n in (1, 3))
    obs, actions = observations(), th.zeros(5)
    a, b = one.evaluate(obs, actions), three.evaluate(obs, actions)
    np.testing.assert_allclose(a.log_prob.detach(), b.log_prob.detach(), atol=1e-6)
    np.testing.assert_allclose(a.values[:, 0].detach(), b.values[:, 0].detach(), atol=1e-6)


# -- critics -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kwargs", [{}, {"net_arch": {"pi": [8], "vf": [8]}}, {"share_features_extractor": False}, {"net_arch": []}]
)
def test_critics_start_different(kwargs: dict[str, Any]):
    policy = make(TwinCriticPolicy, n_critics=3, **kwargs)
    values = policy.evaluate(observations(), th.zeros(5)).values
    assert values.shape == (5, 3)
    assert all((values[:, i] - values[:, j]).abs().min() > 1e-4 for i, j in ((0, 1), (0, 2), (1, 2)))


@pytest.mark.parametrize("ortho_init", [True, False])
def test_further_critics_start_as_sb3_starts_its_own(ortho_init: bool):
    policy = make(TwinCriticPolicy, n_critics=3, net_arch=[3, 3], ortho_init=ortho_init)
    for weights in policy.bodies.weights:
        for weight in weights[1:].detach():
            assert th.allclose(weight @ weight.T, 2 * th.eye(3), atol=1e-5) == ortho_init
        assert not any(th.equal(weights[1], weight) for weight in weights[2:])
    for head in policy.value_weight.detach():
        assert (head.norm().item() == pytest.approx(1.0)) == ortho_init
    assert (policy.value_bias.abs().max().item() == 0) == ortho_init


@pytest.mark.parametrize(
    "kwargs",
    [
        {"optimizer_kwargs": {"foreach": True}},
        {"optimizer_kwargs": {"fused": False}},
        {"optimizer_class": th.optim.RMSprop},
    ],
    ids=str,
)
def test_an_optimizer_of_ones_own_is_made_as_asked(kwargs: dict[str, Any]):
    optimizer = make(TwinCriticPolicy, **kwargs).optimizer
    assert type(optimizer) is kwargs.get("optimizer_class", th.optim.Adam)
    assert not optimizer.defaults.get("fused")


def test_every_critic_is_trained_by_its_own_error_alone():
    policy = make(TwinCriticPolicy, n_critics=2)
    obs = observations()
    policy.evaluate(obs, th.zeros(5)).values[:, 1].sum().backward()
    assert policy.value_weight.grad[0].abs().max() == 0
    assert policy.value_weight.grad[1].abs().max() > 0
    first, second = policy.bodies.weights[0].grad[1:]
    assert first.abs().max() == 0 < second.abs().max()


@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU, nn.PReLU])
def test_networks_side_by_side_compute_what_each_computes_alone(activation: type[nn.Module]):
    networks = [nn.Sequential(nn.Linear(3, 7), activation(), nn.Linear(7, 4), activation()) for _ in range(3)]
    inputs = th.randn(6, 3)
    expected = th.stack([network(inputs) for network in networks])
    made = SerialMlp(networks) if activation is nn.PReLU else ParallelMlp(networks)
    np.testing.assert_allclose(made(inputs).detach(), expected.detach(), atol=1e-6)


def test_activations_with_parameters_are_not_shared_between_actor_and_critics():
    policy = make(TwinCriticPolicy, activation_fn=nn.PReLU)
    assert isinstance(policy.bodies, SerialMlp)
    slopes = [module.weight for module in policy.modules() if isinstance(module, nn.PReLU)]
    assert len({id(slope) for slope in slopes}) == 3 * 2


@pytest.mark.parametrize("alpha", [0.0, 0.3, float("inf")])
def test_the_value_used_lies_between_the_lowest_critic_and_the_mean(alpha: float):
    policy = make(TwinCriticPolicy, n_critics=3, soft_min_alpha=alpha)
    obs = observations(number=50)
    values = policy.evaluate(obs, th.zeros(50)).values
    for used in (policy.predict_values(obs), policy(obs)[1], policy.evaluate_actions(obs, th.zeros(50))[0]):
        assert used.shape == (50, 1)
        assert (used[:, 0] >= values.amin(-1) - 1e-5).all()
        assert (used[:, 0] <= values.mean(-1) + 1e-5).all()


def test_the_temperature_is_in_units_of_the_returns_spread():
    policy = make(TwinCriticPolicy, soft_min_alpha=0.3)
    values = th.randn(20, 2)
    policy.return_scale.fill_(1.0)
    plain = policy.aggregate(values)
    policy.return_scale.fill_(500.0)
    np.testing.assert_allclose(policy.aggregate(500 * values), 500 * plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kwargs", "name"), [({"n_critics": 0}, "n_critics"), ({"soft_min_alpha": -0.1}, "soft_min_alpha")]
)
def test_impossible_critics_are_refused(kwargs: dict[str, Any], name: str):
    with pytest.raises(ValueError, match=name):
        make(TwinCriticPolicy, **kwargs)


def test_different_extractors_for_actor_and_critics_are_trained_apart():
    class Extractor(FlattenExtractor):
        def __init__(self, space: spaces.Box) -> None:
            super().__init__(space)
            self.scale = nn.Parameter(th.ones(3))

        def forward(self, obs: th.Tensor) -> th.Tensor:
            return super().forward(obs) * self.scale

    policy = make(TwinCriticPolicy, features_extractor_class=Extractor, share_features_extractor=False)
    policy.evaluate(observations(), th.zeros(5)).values.sum().backward()
    assert policy.pi_features_extractor.scale.grad is None
    assert policy.vf_features_extractor.scale.grad.abs().max() > 0


# -- target critics ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", [nn.Tanh, nn.PReLU])
@pytest.mark.parametrize("net_arch", [[8], {"pi": [4], "vf": [8]}])
def test_target_critics_follow_by_the_polyak_rule(activation: type[nn.Module], net_arch: Any):
    policy = make(TwinCriticPolicy, activation_fn=activation, net_arch=net_arch)
    policy.make_target_critics()
    start = [
        *(p.clone() for p in policy.target_bodies.parameters()),
        policy.target_weight.clone(),
        policy.target_bias.clone(),
    ]
    jolt(policy)
    live = [*policy.bodies.parameters(), policy.value_weight, policy.value_bias]
    policy.update_target_critics(0.1)
    lagging = [*policy.target_bodies.parameters(), policy.target_weight, policy.target_bias]
    for before, now, target in zip(start, live, lagging, strict=True):
        np.testing.assert_allclose(target, 0.9 * before.detach() + 0.1 * now.detach(), atol=1e-6)
        assert not target.requires_grad


def test_target_critics_supply_the_values_that_advantages_are_made_of():
    policy = make(TwinCriticPolicy)
    obs = observations()
    policy.make_target_critics()
    before = policy.predict_values(obs).detach()
    jolt(policy)
    np.testing.assert_allclose(policy.predict_values(obs).detach(), before, atol=1e-6)
    np.testing.assert_allclose(policy(obs)[1].detach(), before, atol=1e-6)
    live = policy.aggregate(policy.evaluate(obs, th.zeros(5)).values).detach()
    assert (live - before).abs().max() > 1e-3
    policy.update_target_critics(1.0)
    np.testing.assert_allclose(policy.predict_values(obs).detach(), live, atol=1e-6)


# -- reference policy ----------------------------------------------------------------------------------------------

KINDS = [
    pytest.param(VECTOR, DISCRETE, {}, id="discrete"),
    pytest.param(VECTOR, BOX, {}, id="box"),
    pytest.param(VECTOR, BOX, {"use_sde": True}, id="sde"),
    pytest.param(VECTOR, ACTIONS["multi_discrete"], {}, id="multi_discrete"),
    pytest.param(VECTOR, ACTIONS["multi_binary"], {}, id="multi_binary"),
]


@pytest.mark.parametrize(("observation_space", "action_space", "kwargs"), KINDS)
def test_a_frozen_reference_is_the_policy_at_no_distance_and_does_not_move(
    observation_space: spaces.Space[Any], action_space: spaces.Space[Any], kwargs: dict[str, Any]
):
    policy = make(TwinCriticPolicy, observation_space, action_space, **kwargs)
    obs = observations()
    actions, _, log_prob = policy(obs)
    policy.freeze_reference()
    np.testing.assert_allclose(policy.reference_log_prob(obs, actions), log_prob.detach(), atol=1e-6)
    np.testing.assert_allclose(policy.exact_kl(obs).detach(), np.zeros(5), atol=1e-6)
    jolt(policy)
    np.testing.assert_allclose(policy.reference_log_prob(obs, actions), log_prob.detach(), atol=1e-6)
    assert (policy.exact_kl(obs) > 1e-5).all()


def torch_distribution(distribution: Distribution) -> Any:
    """A copy: SB3 keeps one distribution object per policy."""
    return distribution.distribution


@pytest.mark.parametrize(("observation_space", "action_space", "kwargs"), KINDS)
def test_the_exact_kl_is_the_closed_form_summed_over_action_dimensions(
    observation_space: spaces.Space[Any], action_space: spaces.Space[Any], kwargs: dict[str, Any]
):
    policy = make(TwinCriticPolicy, observation_space, action_space, **kwargs)
    policy.freeze_reference()
    jolt(policy)
    obs = observations()
    p, q = (torch_distribution(one.get_distribution(obs)) for one in (policy, policy.reference))
    pairs = list(zip(p, q, strict=True)) if isinstance(p, list) else [(p, q)]
    parts = [th.distributions.kl_divergence(*pair).detach().numpy().reshape(5, -1).sum(-1) for pair in pairs]
    exact = policy.exact_kl(obs)
    assert exact.shape == (5,)
    assert exact.requires_grad
    np.testing.assert_allclose(exact.detach(), np.sum(parts, axis=0), atol=1e-6)


@pytest.mark.parametrize("kind", ["discrete", "multi_discrete", "multi_binary"])
def test_the_loss_of_certainty_is_that_of_all_other_actions(kind: str):
    """Where it can be had from the log-probability as well, by value and gradient; and where that cannot tell."""
    policy = make(TwinCriticPolicy, VECTOR, ACTIONS[kind])
    jolt(policy)
    obs, rows = observations(), th.tensor([3, 0])
    actions = policy(obs)[0].float()
    evaluation = policy.evaluate(obs, actions)
    others = policy.log_others(obs, actions, evaluation, rows)
    expected = th.log(-th.expm1(evaluation.log_prob[rows]))
    np.testing.assert_allclose(others.detach(), expected.detach(), rtol=1e-4)
    parameters = list(policy.action_net.parameters())
    for a, b in zip(
        *(th.autograd.grad(x.sum(), parameters, retain_graph=True) for x in (others, expected)), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=1e-4)
    with th.no_grad():
        policy.action_net.weight *= 300
    certain = policy.get_distribution(obs).mode().float()
    evaluation = policy.evaluate(obs, certain)
    sure = th.nonzero(evaluation.log_prob > -1e-9).view(-1)
    assert len(sure) > 0
    assert (policy.log_others(obs, certain, evaluation, sure) < -17).all()


def test_a_distribution_that_is_not_known_has_what_its_log_probability_tells():
    class Own(Distribution):
        def __init__(self, whole: Any) -> None:
            self.whole = whole

        def log_prob(self, actions: th.Tensor) -> th.Tensor:
            return self.whole.log_prob(actions)

        def entropy(self) -> th.Tensor:
            return self.whole.entropy()

        proba_distribution = proba_distribution_net = sample = mode = actions_from_params = log_prob_from_params = None

    class OwnPolicy(TwinCriticPolicy):
        def _get_action_dist_from_latent(self, latent_pi: th.Tensor) -> Any:
            return Own(super()._get_action_dist_from_latent(latent_pi))

    policy = make(OwnPolicy)
    obs, actions, rows = observations(), th.zeros(5), th.arange(2)
    evaluation = policy.evaluate(obs, actions)
    expected = th.log(-th.expm1(evaluation.log_prob[:2])).detach()
    np.testing.assert_allclose(policy.log_others(obs, actions, evaluation, rows).detach(), expected, rtol=1e-4)


def test_the_reference_is_neither_trained_nor_copied_into_the_next_reference():
    policy = make(TwinCriticPolicy)
    trained = {id(p) for group in policy.optimizer.param_groups for p in group["params"]}
    policy.make_target_critics()
    policy.freeze_reference()
    size = len(policy.state_dict())
    policy.freeze_reference()
    assert len(policy.state_dict()) == size
    assert trained.isdisjoint(map(id, policy.reference.parameters()))
    assert not any(parameter.requires_grad for parameter in policy.reference.parameters())
    assert trained == {id(p) for p in policy.parameters() if p.requires_grad}
    policy.reference.predict_values(observations())


def test_a_policy_that_has_been_trained_can_be_frozen():
    for action_space in ACTIONS.values():
        policy = make(TwinCriticPolicy, VECTOR, action_space)
        obs = observations()
        actions, _, _ = policy(obs)
        policy.evaluate(obs, actions).log_prob.sum().backward()
        policy.optimizer.step()
        policy.freeze_reference()
        np.testing.assert_allclose(policy.exact_kl(obs).detach(), np.zeros(5), atol=1e-6)


def test_the_reference_stays_in_evaluation_mode():
    policy = make(TwinCriticPolicy)
    policy.freeze_reference()
    policy.set_training_mode(True)
    assert not policy.reference.training


# -- files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_extras", [False, True])
def test_a_saved_policy_loads_as_it_was(tmp_path: Path, with_extras: bool):
    policy = make(TwinCriticPolicy, n_critics=3, soft_min_alpha=0.7)
    if with_extras:
        policy.make_target_critics()
        policy.freeze_reference()
        jolt(policy)
    policy.save(str(tmp_path / "policy"))
    loaded = TwinCriticPolicy.load(str(tmp_path / "policy"))
    assert (loaded.n_critics, loaded.soft_min_alpha) == (3, 0.7)
    obs, actions = observations(), th.zeros(5)
    np.testing.assert_allclose(loaded.predict_values(obs).detach(), policy.predict_values(obs).detach(), atol=1e-6)
    for a, b in zip(loaded.evaluate(obs, actions)[:3], policy.evaluate(obs, actions)[:3], strict=True):
        np.testing.assert_allclose(a.detach(), b.detach(), atol=1e-6)
    if with_extras:
        np.testing.assert_allclose(loaded.exact_kl(obs).detach(), policy.exact_kl(obs).detach(), atol=1e-6)


@pytest.mark.parametrize(
    ("space", "kwargs"),
    [
        (spaces.Box(0.0, 1.0, (1, 36, 36), np.float32), {"normalize_images": False}),
        (VECTOR, {"features_extractor_class": FlattenExtractor}),
    ],
    ids=["scaled", "own-extractor"],
)
def test_a_cnn_policy_takes_what_its_extractor_takes(space: spaces.Space[Any], kwargs: dict[str, Any]):
    policy = make(TwinCriticCnnPolicy, space, **kwargs)
    assert policy.predict_values(observations(space)).shape == (5, 1)


# -- what a subclass may change ----------------------------------------------------------------------------------------


class Masked:
    """Never takes action 0."""

    def _get_action_dist_from_latent(self, latent_pi: th.Tensor) -> Distribution:
        logits = self.action_net(latent_pi)  # type: ignore[attr-defined]
        return self.action_dist.proba_distribution(logits - th.tensor([1e8, 0, 0]))  # type: ignore[attr-defined]


class MaskedPolicy(Masked, TwinCriticPolicy):
    pass


def test_a_distribution_of_ones_own_is_used_everywhere():
    policy = make(MaskedPolicy)
    policy.set_training_mode(False)
    obs = observations(number=200)
    with th.no_grad():
        taken = (policy(obs)[0], policy._predict(obs), policy.get_distribution(obs).sample())
    assert all(not (actions == 0).any() for actions in taken)
    allowed = th.cat([policy.evaluate(obs[:9], th.full((9,), float(action))).log_prob for action in (1, 2)])
    np.testing.assert_allclose(allowed.detach().exp().reshape(2, 9).sum(0), 1, rtol=1e-5)


@pytest.mark.parametrize("reference", ["initial", "rollout"])
def test_a_distribution_of_ones_own_is_trained(reference: Any):
    model = SAFE(
        MaskedPolicy, "Tiny-vector-discrete-v0", n_steps=64, batch_size=32, kl_reference=reference, max_preview_kl=1e-9
    )
    before = model.policy.action_net.weight.detach().clone()
    model.learn(128)
    assert not th.equal(model.policy.action_net.weight, before)


class Squashed:
    def _build(self, lr_schedule: Any) -> None:
        self.action_dist = SquashedDiagGaussianDistribution(2)
        super()._build(lr_schedule)  # type: ignore[misc]


class SquashedPolicy(Squashed, TwinCriticPolicy):
    pass


class SquashedSB3(Squashed, ActorCriticPolicy):
    pass


def test_a_squashed_gaussian_is_not_taken_for_a_plain_one():
    results = []
    for kind, kwargs in ((SquashedPolicy, {"n_critics": 1}), (SquashedSB3, {})):
        policy = make(kind, action_space=BOX, log_std_init=1.0, **kwargs)
        policy.set_training_mode(False)
        th.manual_seed(1)
        with th.no_grad():
            results.append([output.numpy() for output in policy(observations(number=50))])
    for ours, theirs in zip(*results, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert np.abs(results[0][0]).max() <= 1


class Normed(TwinCriticPolicy):
    def _build_mlp_extractor(self) -> None:
        super()._build_mlp_extractor()
        self.mlp_extractor.value_net = nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.ReLU())
        self.mlp_extractor.latent_dim_vf = 8


def test_further_critics_have_the_layers_of_the_first():
    policy = make(Normed)
    first, second = policy.bodies
    assert [type(layer) for layer in first] == [type(layer) for layer in second]
    assert not th.equal(first[0].weight, second[0].weight)
    values = policy.evaluate(observations(), th.zeros(5)).values.detach()
    assert values.shape == (5, 2)


class Doubled(nn.Linear):
    def forward(self, features: th.Tensor) -> th.Tensor:
        return 2 * super().forward(features)


def test_a_layer_derived_from_linear_is_evaluated_as_it_is():
    networks = [nn.Sequential(Doubled(3, 4), nn.Tanh()) for _ in range(2)]
    features = th.randn(5, 3)
    expected = th.stack([network(features) for network in networks])
    th.testing.assert_close(side_by_side(networks)(features), expected)


class WithTrunk(nn.Module):
    """Actor and critic share a layer."""

    latent_dim_pi, latent_dim_vf = 5, 6

    def __init__(self, features_dim: int) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(features_dim, 7), nn.LayerNorm(7), nn.ReLU())
        self.scale = nn.Parameter(th.randn(7))
        self.actor, self.critic = nn.Linear(7, 5), nn.Linear(7, 6)

    def forward(self, features: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        return self.forward_actor(features), self.forward_critic(features)

    def forward_actor(self, features: th.Tensor) -> th.Tensor:
        return self.actor(self.scale * self.trunk(features))

    def forward_critic(self, features: th.Tensor) -> th.Tensor:
        return self.critic(self.scale * self.trunk(features))


class WithTrunkPolicy(TwinCriticPolicy):
    def _build_mlp_extractor(self) -> None:
        self.mlp_extractor = WithTrunk(self.features_dim)


class WithTrunkSB3(ActorCriticPolicy):
    def _build_mlp_extractor(self) -> None:
        self.mlp_extractor = WithTrunk(self.features_dim)


@pytest.mark.parametrize("shared", [True, False])
def test_a_network_of_ones_own_with_one_critic_is_that_of_sb3(shared: bool):
    obs, kwargs = observations(), {"share_features_extractor": shared}
    ours, theirs = make(WithTrunkPolicy, n_critics=1, **kwargs), make(WithTrunkSB3, **kwargs)
    assert len(list(ours.parameters())) == len(list(theirs.parameters()))
    th.testing.assert_close(ours.predict_values(obs), theirs.predict_values(obs))
    for policy in (ours, theirs):
        values, log_prob, entropy = policy.evaluate_actions(obs, th.zeros(5))
        (values.sum() + log_prob.sum() + entropy.sum()).backward()
        policy.optimizer.step()
    th.testing.assert_close(ours.predict_values(obs), theirs.predict_values(obs))
    th.testing.assert_close(
        ours.get_distribution(obs).distribution.logits, theirs.get_distribution(obs).distribution.logits
    )


def test_further_critics_are_built_as_a_network_of_ones_own_is():
    policy = make(WithTrunkPolicy, n_critics=3, soft_min_alpha=0)
    networks = [part.extractor for part in policy.bodies]
    assert networks[0] is policy.actor_body.extractor
    assert not any(th.equal(networks[0].scale, other.scale) for other in networks[1:])
    assert not th.equal(networks[1].scale, networks[2].scale)
    values = policy.evaluate(observations(), th.zeros(5)).values
    assert values.shape == (5, 3)
    assert len({tuple(column.tolist()) for column in values.T}) == 3


@pytest.mark.parametrize("settings", [{"critic_tau": 0.1}, {"kl_reference": "initial"}])
def test_a_network_of_ones_own_is_trained_and_loaded(settings: dict[str, Any], tmp_path: Path):
    model = SAFE(WithTrunkPolicy, "CartPole-v1", n_steps=64, seed=0, **settings)
    before = model.policy.actor_body.extractor.scale.detach().clone()
    model.learn(128).save(tmp_path / "model")
    assert not th.equal(before, model.policy.actor_body.extractor.scale)
    loaded = SAFE.load(tmp_path / "model")
    assert loaded.policy.bodies[0].extractor is loaded.policy.actor_body.extractor
    for name, tensor in model.policy.state_dict().items():
        assert th.equal(tensor, loaded.policy.state_dict()[name]), name


class SharedNetPolicy(TwinCriticPolicy):
    def _build_mlp_extractor(self) -> None:
        super()._build_mlp_extractor()
        self.mlp_extractor.value_net = self.mlp_extractor.policy_net


def test_a_network_that_actor_and_critic_share_stays_shared():
    policy = make(SharedNetPolicy)
    assert policy.bodies[0].extractor.value_net is policy.actor_body.extractor.policy_net
    assert not th.equal(*(part.extractor.value_net[0].weight for part in policy.bodies))


class HalfNetwork(nn.Module):
    latent_dim_pi = latent_dim_vf = 3

    def forward_actor(self, features: th.Tensor) -> th.Tensor:
        return features


class HalfNetworkPolicy(TwinCriticPolicy):
    def _build_mlp_extractor(self) -> None:
        self.mlp_extractor = HalfNetwork()


def test_a_network_without_a_part_for_the_critic_is_refused():
    with pytest.raises(ValueError, match=r"HalfNetwork.*forward_critic"):
        make(HalfNetworkPolicy)


def test_hooks_are_called():
    policy = make(TwinCriticPolicy)
    calls: list[str] = []
    policy.action_net.register_forward_hook(lambda *_: calls.append("actor"))
    policy.features_extractor.register_forward_hook(lambda *_: calls.append("features"))
    policy.set_training_mode(False)
    with th.no_grad():
        policy(observations())
    assert sorted(calls) == ["actor", "features"]


def test_an_activation_over_features_is_over_those_of_each_observation():
    """Networks side by side have an axis more, which an activation over an axis would take for it."""
    ours, theirs = (
        make(kind, activation_fn=partial(nn.Softmax, dim=1), **kwargs)
        for kind, kwargs in ((TwinCriticPolicy, {"n_critics": 1}), (ActorCriticPolicy, {}))
    )
    obs = observations()
    np.testing.assert_allclose(ours.predict_values(obs).detach(), theirs.predict_values(obs).detach(), atol=1e-6)
