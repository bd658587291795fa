import pytest
import torch
from diffusers import DDPMScheduler, PNDMScheduler

from diffusers_pq.models.class_conditioning import predicts_sample, scheduler_input
from diffusers_pq.training.noise import (
    adapt_schedule,
    add_noise,
    create_scheduler,
    denoising_loss,
    draw_timesteps,
    latent_shift,
    predicted_latents,
)


def signal_to_noise(scheduler):
    alphas = scheduler.alphas_cumprod.double()
    return alphas / (1 - alphas)


def test_a_shift_divides_the_signal_to_noise_ratio_alike_in_diffusion_and_flow_matching():
    shift = latent_shift(128, 32, 32)
    assert shift == pytest.approx(32**0.5) and latent_shift(4, 32, 32) == 1
    plain, shifted = (create_scheduler("diffusion", shift=value).alphas_cumprod.double() for value in (1.0, shift))
    ratio = (plain / (1 - plain)) / (shifted / (1 - shifted))
    torch.testing.assert_close(ratio, torch.full_like(ratio, shift**2), rtol=1e-3, atol=0)
    plain, shifted = (create_scheduler("flow_matching", shift=value) for value in (1.0, shift))
    sigmas = [
        draw_timesteps(scheduler, 100, generator=torch.Generator().manual_seed(0)).double() / 1000
        for scheduler in (plain, shifted)
    ]
    snr = [((1 - sigma) / sigma) ** 2 for sigma in sigmas]
    torch.testing.assert_close(snr[0] / snr[1], torch.full_like(snr[0], shift**2), rtol=1e-3, atol=0)


def test_a_models_own_schedule_is_shifted_and_ends_in_noise():
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    source = PNDMScheduler(**betas, prediction_type="v_prediction")
    same = adapt_schedule(source)
    torch.testing.assert_close(same.alphas_cumprod, source.alphas_cumprod)
    assert same.config.prediction_type == "v_prediction" and same.config.timestep_spacing == "leading"

    shift = latent_shift(64, 16, 16, base_dimension=4 * 16 * 16)
    assert shift == 4
    shifted = adapt_schedule(source, shift)
    ratio = signal_to_noise(same) / signal_to_noise(shifted)
    torch.testing.assert_close(ratio, torch.full_like(ratio, 16), rtol=1e-3, atol=0)

    noise_at_the_end = adapt_schedule(source, shift, rescale_betas_zero_snr=True)
    assert noise_at_the_end.alphas_cumprod[-1] < 1e-6
    noise_at_the_end.set_timesteps(4)
    assert noise_at_the_end.timesteps.tolist() == [999, 749, 499, 249]
    # The last step must leave nothing of the noise that the first timestep has after the shift.
    latents, noise = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    noisy = noise_at_the_end.add_noise(latents, noise, torch.tensor([249]))
    velocity = noise_at_the_end.get_velocity(latents, noise, torch.tensor([249]))
    torch.testing.assert_close(noise_at_the_end.step(velocity, 249, noisy).prev_sample, latents)


def test_epsilon_cannot_be_predicted_without_a_signal():
    with pytest.raises(ValueError, match="`rescale_betas_zero_snr` needs `prediction_type` v_prediction"):
        create_scheduler("diffusion", "epsilon", rescale_betas_zero_snr=True)
    with pytest.raises(ValueError, match="`rescale_betas_zero_snr` needs `prediction_type` v_prediction"):
        adapt_schedule(DDPMScheduler(), rescale_betas_zero_snr=True)


@pytest.mark.parametrize("objective", ["diffusion", "flow_matching"])
def test_the_loss_of_predicted_latents_is_that_of_the_velocity_that_follows(objective):
    by_sample = create_scheduler(objective, "sample")
    by_velocity = create_scheduler(objective, "v_prediction")
    latents = torch.randn(64, 4, 2, 2, generator=torch.Generator().manual_seed(0))

    def guess(noisy, timesteps, condition):
        return 0.9 * latents

    def same_guess(noisy, timesteps, condition):
        if objective == "flow_matching":
            return (noisy - 0.9 * latents) / (timesteps / 1000).view(-1, 1, 1, 1)
        alphas = by_velocity.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        return (alphas.sqrt() * noisy - 0.9 * latents) / (1 - alphas).sqrt()

    def loss(scheduler, denoiser, **options):
        generator = torch.Generator().manual_seed(1)
        return denoising_loss(denoiser, scheduler, latents, None, generator=generator, **options)

    options = [{}] if objective == "flow_matching" else [{}, {"snr_gamma": 5.0}]
    for option in options:
        found, expected = loss(by_sample, guess, **option), loss(by_velocity, same_guess, **option)
        clear = found < expected * 0.999  # nearly no noise, where the weight is bounded
        assert clear.float().mean() < 0.1
        torch.testing.assert_close(found[~clear], expected[~clear], rtol=1e-3, atol=1e-6)
    timesteps = torch.full((64,), 500)
    noisy, target = add_noise(by_sample, latents, torch.randn_like(latents), timesteps)
    assert torch.equal(predicted_latents(by_sample, target, noisy, timesteps), latents)


def test_a_flow_of_predicted_latents_ends_at_them_and_is_kept_in_the_config(tmp_path):
    scheduler = create_scheduler("flow_matching", "sample", shift=2.0)
    scheduler.save_pretrained(tmp_path)
    scheduler = type(scheduler).from_pretrained(tmp_path)
    assert predicts_sample(scheduler) and scheduler.config.shift == 2.0
    picture, latents = torch.randn(2, 1, 4, 2, 2).unbind(0)
    scheduler.set_timesteps(4)
    for timestep in scheduler.timesteps:
        velocity = scheduler_input(scheduler, picture, latents, timestep)
        latents = scheduler.step(velocity, timestep, latents).prev_sample
    torch.testing.assert_close(latents, picture)


@pytest.mark.parametrize("objective", ["diffusion", "flow_matching"])
def test_offset_noise_is_of_the_target_and_a_perturbation_is_not(objective):
    scheduler = create_scheduler(objective, "v_prediction" if objective == "diffusion" else "epsilon")
    latents = torch.zeros(4, 3, 8, 8)
    seen = {}

    def denoiser(noisy, timesteps, condition):
        seen["noisy"] = noisy
        return torch.zeros_like(noisy)

    def run(**options):
        generator = torch.Generator().manual_seed(0)
        loss = denoising_loss(denoiser, scheduler, latents, None, generator=generator, **options)
        return seen["noisy"], loss

    noisy, loss = run()
    offset_noisy, offset_loss = run(noise_offset=10.0)
    extra = offset_noisy - noisy
    torch.testing.assert_close(extra, extra.mean((2, 3), keepdim=True).expand_as(extra), atol=1e-4, rtol=1e-4)
    assert (offset_loss > loss).all()
    perturbed_noisy, perturbed_loss = run(input_perturbation=0.5)
    torch.testing.assert_close(perturbed_loss, loss)
    ratio = (perturbed_noisy - noisy).std() / noisy.std()
    assert 0.4 < float(ratio) < 0.6


def test_an_adapted_schedule_has_the_prediction_type_that_is_asked_for():
    assert adapt_schedule(DDPMScheduler(prediction_type="epsilon")).config.prediction_type == "epsilon"
    adapted = adapt_schedule(DDPMScheduler(), rescale_betas_zero_snr=True, prediction_type="v_prediction")
    assert adapted.config.prediction_type == "v_prediction" and adapted.config.rescale_betas_zero_snr
