"""The recipe's section `policy`: how each method of tuning it is set."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from steps.hindsight import GOOD, Template, openings
from steps.sections import USUAL, Pairs, Section, checked_trainer
from steps.trainer_fields import ON_GROUPS, ON_PAIRS, REFERENCE_FREE, fields_of, owned_of


class DPO(Pairs):
    """Direct preference optimisation (arXiv:2305.18290); `trainer.loss_type` chooses its relatives."""

    trainer: Annotated[dict[str, Any], checked_trainer("dpo")] = USUAL


class IPO(Section):
    """Identity preference optimisation (arXiv:2310.12036, eq. 17); `trainer.beta` is τ, a token as TRL has it."""

    trainer: Annotated[dict[str, Any], checked_trainer("ipo")] = USUAL


class CDPO(Section):
    """Conservative DPO (Mitchell 2023); `trainer.label_smoothing` is the share of wrong labels, 0.1 if unsaid."""

    trainer: Annotated[dict[str, Any], checked_trainer("cdpo")] = USUAL


class RobustDPO(Section):
    """DPO whose loss is unbiased under wrong labels (arXiv:2403.00409); `trainer.label_smoothing` is their share."""

    trainer: Annotated[dict[str, Any], checked_trainer("robust")] = USUAL


class RSO(Section):
    """The hinge on implicit rewards of RSO (arXiv:2309.06657), with a reference; SLiC-HF has none."""

    trainer: Annotated[dict[str, Any], checked_trainer("rso")] = USUAL


class KTO(Section):
    """Kahneman–Tversky optimisation (arXiv:2402.01306): each side of a pair is a row of its own, liked or not."""

    trainer: Annotated[dict[str, Any], checked_trainer("kto")] = USUAL


class SimPO(Section):
    """Simple preference optimisation (arXiv:2405.14734); the names are those of TRL's CPOConfig."""

    beta: float = Field(2.0, gt=0, description="β of the mean log-probability of a token.")
    simpo_gamma: float = Field(1.0, ge=0, description="γ: margin the chosen answer shall have.")
    trainer: Annotated[dict[str, Any], checked_trainer("simpo")] = USUAL


class CPO(Section):
    """Contrastive preference optimisation (arXiv:2401.08417); the names are those of TRL's CPOConfig."""

    beta: float = Field(0.1, gt=0)
    cpo_alpha: float = Field(1.0, ge=0, description="Weight of the chosen answers' likelihood.")
    trainer: Annotated[dict[str, Any], checked_trainer("cpo")] = USUAL


class ORPO(Section):
    """Odds-ratio preference optimisation (arXiv:2403.07691); the name is that of TRL's ORPOConfig."""

    beta: float = Field(0.1, gt=0, description="λ: weight of the odds ratio beside the chosen answers' likelihood.")
    trainer: Annotated[dict[str, Any], checked_trainer("orpo")] = USUAL


class SLiC(Section):
    """SLiC-HF on human pairs, "direct" (arXiv:2305.10425, eq. 1)."""

    delta: float = Field(1.0, ge=0, description="δ: nats the chosen answer shall be likelier than the rejected one.")
    lam: float = Field(0.1, ge=0, description="λ: weight of the likelihood of what SFT imitates.")
    target: Literal["demonstrations", "chosen"] = Field(
        "demonstrations",
        description="What SFT imitates: demonstrations, one beside each pair, or the pair's chosen answer, which costs "
        "no more tokens.",
    )
    trainer: Annotated[dict[str, Any], checked_trainer("slic")] = USUAL


class SLiCSampleRank(SLiC):
    """SLiC-HF on the SFT model's own answers: of each prompt's the reward model's favourite against the others."""

    candidates: int = Field(8, ge=2, description="Answers to a prompt.")
    temperature: float = Field(0.7, gt=0)
    max_new_tokens: int = Field(48, ge=1)
    batch_size: int = Field(200, ge=1, description="Prompts answered at once.")
    trainer: Annotated[dict[str, Any], checked_trainer("slic_sample_rank")] = USUAL


_TRL_BATCH = 8  # per_device_train_batch_size, where nobody says one
# What is a loss's own: a method does not take it from `policy.dpo`, whose numbers mean something else.
_OF_THE_LOSS = (
    "beta", "loss_type", "loss_weights", "label_smoothing", "ld_alpha", "f_divergence_type", "f_alpha_divergence_coef",
    "use_weighting", "discopop_tau",
)  # fmt: skip
# TRL's settings that make a method, under what the recipe says.
_MADE_BY: dict[str, dict[str, Any]] = {
    "ipo": {"loss_type": ["ipo"]},
    "cdpo": {"label_smoothing": 0.1},
    "robust": {"loss_type": ["robust"], "label_smoothing": 0.1},
    "rso": {"loss_type": ["hinge"]},
}


class Relative(Pairs):
    """A relative of DPO with all it needs: pairs and training as `policy.dpo` has them, and what is its own.

    Attributes:
        loss: settings of its loss.
    """

    loss: dict[str, Any] = USUAL
    trainer: dict[str, Any] = USUAL


class OnPolicy(Section):
    """What methods have in common that learn from the reward model's scores of the policy's own answers."""

    rollouts: int = Field(16, ge=1, description="How often answers are drawn and learnt from.")
    held_out: int = Field(192, ge=1, description="Held-out pairs the policy's implicit rewards are measured on.")
    measure_every: int = Field(8, ge=1, description="Rollouts between two measurements on the held-out pairs.")
    samples_every: int = Field(4, ge=1, description="Rollouts between two tables of answers.")


class KL(Section):
    """Penalty for leaving the start policy (Ziegler et al. 2019, arXiv:1909.08593, eq. 2 and §2.2)."""

    coefficient: float = Field(0.05, ge=0, description="β, in normalised reward per nat.")
    target: float | None = Field(None, gt=0, description="Nats an answer to steer β towards; fixed if not given.")
    rate: float = Field(0.1, gt=0, description="K_β: how fast β follows.")


class PPO(OnPolicy):
    """Proximal policy optimisation (arXiv:1707.06347) as InstructGPT has it (arXiv:2203.02155).

    Of TRL's fields, `epsilon` is the ratio clip, `num_iterations` the epochs over a rollout, `steps_per_generation`
    the minibatches of a rollout, and `per_device_train_batch_size` the answers in a minibatch.
    """

    kl: KL = KL()  # type: ignore[call-arg]
    gamma: float = Field(1.0, gt=0, le=1, description="Discount of later rewards.")
    lam: float = Field(0.95, ge=0, le=1, description="λ of GAE; 1 gives Monte-Carlo returns.")
    value_coefficient: float = Field(0.5, gt=0, description="Weight of the critic's loss.")
    value_clip: float | None = Field(0.2, gt=0, description="Clip of the critic's change; none when null.")
    critic_learning_rate: float | None = Field(None, gt=0, description="The policy's when not given.")
    critic_start: Literal["reward", "zero"] = Field("reward", description="Where the critic begins.")
    critic_warmup: int = Field(0, ge=0, description="Rollouts from which the critic alone learns, at first.")
    backbone: Literal["shared", "separate"] = Field(
        "shared", description="Policy, reference, reward model and critic as adapters over one base, or models apart."
    )
    normalise_reward: int = Field(
        128, ge=0, description="Answers of the start policy whose rewards get mean 0 and variance 1; 0 for none."
    )
    reward_clip: float | None = Field(None, gt=0, description="Bound of the normalised reward.")
    whiten_rewards: bool = False
    whiten_advantages: bool = True
    missing_eos_penalty: float = Field(0.0, ge=0, description="Taken from the reward of an answer that was cut off.")
    entropy_coefficient: float = Field(0.0, ge=0, description="Weight of an entropy bonus, in loss per nat.")
    ptx_coefficient: float = Field(0.0, ge=0, description="γ of InstructGPT's pre-training mix, on demonstrations.")
    update_kl: float | None = Field(
        None, gt=0, description="Nats a token; a rollout's updates stop once the policy has moved further than this."
    )
    trainer: Annotated[dict[str, Any], checked_trainer("ppo")] = USUAL


class RLOO(OnPolicy):
    """REINFORCE leave-one-out (arXiv:2402.14740), TRL's trainer on our reward model.

    A prompt gets `trainer.num_generations` answers. Rollouts and training hold for `grpo` and `spo` too, but for the
    weight of the KL: `trainer.beta` is reward per nat here.
    """

    trainer: Annotated[dict[str, Any], checked_trainer("rloo")] = USUAL


class GRPO(Section):
    """Group-relative policy optimisation (arXiv:2402.03300), TRL's trainer on our reward model.

    `trainer.beta` weighs a token's KL beside advantages of variance 1.
    """

    trainer: Annotated[dict[str, Any], checked_trainer("grpo")] = USUAL


class SPO(Section):
    """Self-play preference optimisation (arXiv:2401.04056): RLOO of how often an answer wins against the others.

    `trainer.beta` is win rate per nat.
    """

    trainer: Annotated[dict[str, Any], checked_trainer("spo")] = USUAL


class Groups(OnPolicy):
    """A method of `ON_GROUPS` with all it needs: rollouts and training as `policy.rloo` has them, and its own."""

    trainer: dict[str, Any] = USUAL


class ChainOfHindsight(Pairs):
    """Chain of Hindsight (arXiv:2302.02676): fitted to good and bad answers with words about them, asked with praise.

    `trainer` holds fields of TRL's SFTConfig; `max_length` cuts a chain of two answers.
    """

    templates: tuple[str, ...] = Field(
        (
            "\nGood:\n{good}\nBad:\n{bad}",
            "\nBad:\n{bad}\nGood:\n{good}",
            "\nYou're a helpful assistant:\n{good}\nYou're an unhelpful assistant:\n{bad}",
            "\nYou're an unhelpful assistant:\n{bad}\nYou're a helpful assistant:\n{good}",
        ),
        min_length=1,
        description="What follows the prompt: words, and the places of the answers. One is drawn for each pair and "
        "epoch. The policy is asked with the words of the first that begins with {good}.",
    )
    hidden_least: float = Field(
        0.05, ge=0, le=1, description="Least share of a good answer's tokens that a bad one after it cannot look at."
    )
    hidden_most: float = Field(0.10, ge=0, le=1, description="The largest such share.")
    sft_coefficient: float = Field(0.0, ge=0, description="λ of the regulariser: demonstrations learnt beside chains.")
    beta: float = Field(0.1, gt=0, description="Unit of the implicit rewards; it has no part in the training.")
    trainer: Annotated[dict[str, Any], checked_trainer("chain_of_hindsight")] = USUAL

    @field_validator("templates")
    @classmethod
    def _can_be_learnt(cls, templates: tuple[str, ...]) -> tuple[str, ...]:
        problems, parsed = [], []
        for number, text in enumerate(templates):
            try:
                parsed.append(Template.parse(text))
            except ValueError as problem:
                problems.append(f"number {number}: {problem}")
        if problems:
            raise ValueError("; ".join(problems))
        if GOOD not in openings(parsed):
            raise ValueError("none begins with {good}, so the policy would learn nothing to be asked with")
        return templates

    @model_validator(mode="after")
    def _shares_in_order(self) -> ChainOfHindsight:
        if self.hidden_least > self.hidden_most:
            raise ValueError("hidden_least must not be above hidden_most")
        return self


class BestOfN(Section):
    """No training: of n answers of the start, the one the reward model scores highest."""

    n: int = Field(16, ge=2)


class Policy(Section):
    """How the policy is tuned. A recipe may hold settings of several methods; `method` says whose are used."""

    method: Literal[
        "dpo", "ipo", "cdpo", "robust", "rso", "kto", "simpo", "cpo", "orpo", "slic", "slic_sample_rank",
        "ppo", "rloo", "grpo", "spo", "chain_of_hindsight", "best_of_n", "sft",
    ] = "dpo"  # fmt: skip
    start: Literal["sft", "champion"] = Field(
        "sft",
        description="Where training begins: at the SFT model, or at the champion if there is one. The reference, "
        "which the KL penalty and implicit rewards are measured against, is the SFT model either way.",
    )
    dpo: DPO = DPO()  # type: ignore[call-arg]
    ipo: IPO = IPO()
    cdpo: CDPO = CDPO()
    robust: RobustDPO = RobustDPO()
    rso: RSO = RSO()
    kto: KTO = KTO()
    simpo: SimPO = SimPO()  # type: ignore[call-arg]
    cpo: CPO = CPO()  # type: ignore[call-arg]
    orpo: ORPO = ORPO()  # type: ignore[call-arg]
    slic: SLiC = SLiC()  # type: ignore[call-arg]
    slic_sample_rank: SLiCSampleRank = SLiCSampleRank()  # type: ignore[call-arg]
    ppo: PPO = PPO()  # type: ignore[call-arg]
    rloo: RLOO = RLOO()  # type: ignore[call-arg]
    grpo: GRPO = GRPO()  # type: ignore[call-arg]
    spo: SPO = SPO()  # type: ignore[call-arg]
    chain_of_hindsight: ChainOfHindsight = ChainOfHindsight()  # type: ignore[call-arg]
    best_of_n: BestOfN = BestOfN()  # type: ignore[call-arg]

    @model_validator(mode="after")
    def _start_is_trained_from(self) -> Policy:
        if self.method in ("best_of_n", "sft") and self.start == "champion":
            raise ValueError(f"{self.method} trains nothing that could start at the champion; set policy.start=sft")
        return self

    @property
    def groups(self) -> Groups:
        """The settings of the method in use, one of `ON_GROUPS`, completed by what it shares with RLOO."""
        own = getattr(self, self.method).trainer
        kept = fields_of(self.method).difference(owned_of(self.method), ("beta",))  # which each has in another unit
        shared = {name: value for name, value in self.rloo.trainer.items() if name in kept}
        return Groups(**self.rloo.model_dump(exclude={"trainer"}), trainer={**shared, **own})

    @property
    def relative(self) -> Relative:
        """The settings of the method in use, one of `RELATIVES`, completed by what it shares with DPO."""
        own = getattr(self, self.method)
        kept = fields_of(self.method).difference(() if self.method in REFERENCE_FREE else _OF_THE_LOSS)
        kept = kept.difference(name for name in owned_of(self.method) if name != "beta")
        shared = {name: value for name, value in self.dpo.trainer.items() if name in kept}
        if self.method == "kto":  # a pair is two rows: the same pairs in a batch, and as many steps
            shared["per_device_train_batch_size"] = 2 * shared.get("per_device_train_batch_size", _TRL_BATCH)
        return Relative(
            **self.dpo.model_dump(exclude={"trainer"}),
            trainer={**shared, **_MADE_BY.get(self.method, {}), **own.trainer},
            loss=own.model_dump(mode="json", exclude={"trainer"}),
        )


# Methods on DPO's pairs that take from `policy.dpo` what their own section does not say.
RELATIVES = (*ON_PAIRS[1:], "kto")
# The section that completes a method's own.
SHARED = {**dict.fromkeys(RELATIVES, "dpo"), **dict.fromkeys(ON_GROUPS, "rloo")}
