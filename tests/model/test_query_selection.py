"""Where queries start: learned, or from the best proposals of the encoder."""

from __future__ import annotations

import pytest
import torch
from model.helpers import crop_tokens, cropped, random_pyramid, randomize, tiny_config
from torch import Tensor

from msdetr.model.heads import DetectionHeads
from msdetr.model.proposal_queries import ProposalQueries, proposal_anchors
from msdetr.model.query_selection import AnchorQueries, EmbeddedQueries, Queries
from msdetr.ops.ms_deform_attn import padding_mask

SHAPES = ((4, 6), (2, 3))
VALID_SIZES = [[(3, 4), (2, 2)], [(4, 6), (2, 3)]]


def proposing(**changes) -> tuple[ProposalQueries, DetectionHeads]:
    config = tiny_config(**changes)
    selection, heads = ProposalQueries(config).double(), DetectionHeads(config, 3).double()
    randomize(selection)
    randomize(heads)
    return selection, heads


class TestAnchors:
    def test_centres_and_sides(self):
        logits, valid = proposal_anchors(((2, 2), (1, 1)), torch.tensor([[[2, 2], [1, 1]]]))
        assert valid.all()
        expected = [[x, y, 0.05, 0.05] for y in (0.25, 0.75) for x in (0.25, 0.75)]
        expected.append([0.5, 0.5, 0.1, 0.1])
        torch.testing.assert_close(logits.sigmoid(), torch.tensor([expected]))
        assert logits.dtype == torch.float32

    def test_padding_proposes_nothing(self):
        valid_sizes = torch.tensor(VALID_SIZES)
        logits, valid = proposal_anchors(SHAPES, valid_sizes)
        assert torch.equal(~valid, padding_mask(SHAPES, valid_sizes))
        assert logits[valid].isfinite().all()
        assert (logits[~valid] == float("inf")).all()

    def test_padding_changes_no_anchor(self):
        padded = proposal_anchors(SHAPES, torch.tensor(VALID_SIZES))
        shapes = tuple(VALID_SIZES[0])
        alone = proposal_anchors(shapes, torch.tensor(VALID_SIZES[:1]))
        for result, expected in zip(padded, alone, strict=True):
            assert torch.equal(crop_tokens(result[:1], SHAPES, shapes), expected)

    def test_the_very_edge_proposes_nothing(self):
        """Cell centres within 0.01 of the border, on maps of more than 50 cells."""
        _, valid = proposal_anchors(((1, 60),), torch.tensor([[[1, 60]]]))
        assert valid[0].tolist() == [False, *[True] * 58, False]

    def test_levels_whose_boxes_would_fill_the_image_propose_nothing(self):
        shapes = ((2, 2),) * 5 + ((1, 1),)
        _, valid = proposal_anchors(shapes, torch.tensor([list(shapes)]))
        assert valid[0].tolist() == [True] * 20 + [False]


class TestProposals:
    @pytest.mark.parametrize("mixed_selection", [False, True])
    def test_the_best_proposals_become_queries(self, mixed_selection):
        selection, heads = proposing(mixed_selection=mixed_selection)
        pyramid = random_pyramid(SHAPES, VALID_SIZES)
        queries = selection(pyramid, heads)
        proposals = queries.proposals["encoder"].predictions
        scores, boxes = proposals.logits[0, ..., 0], proposals.boxes[0]
        best = scores.argsort(dim=1, descending=True)[:, :4]
        for image in range(2):
            assert torch.equal(queries.reference[image], boxes[image, best[image]])
        assert not queries.reference.requires_grad
        assert queries.content.shape == queries.query_pos.shape == (2, 4, 32)
        if mixed_selection:
            learned = selection.query_embed.weight
            assert torch.equal(queries.content, learned.expand(2, -1, -1))
        else:
            assert not torch.equal(queries.content[0], queries.content[1])

    def test_anchors_are_what_proposals_start_from(self):
        selection, heads = proposing()
        for parameter in heads.bbox_embed[2].last.parameters():
            parameter.data.zero_()
        pyramid = random_pyramid(SHAPES, VALID_SIZES)
        queries = selection(pyramid, heads)
        proposals, anchors, _ = queries.proposals["encoder"]
        torch.testing.assert_close(proposals.boxes[0].float(), anchors)
        padding = padding_mask(SHAPES, pyramid.valid_sizes)
        assert (anchors[padding] == 1.0).all()
        assert anchors.isfinite().all()

    def test_training_and_evaluation_choose_the_same(self):
        selection, heads = proposing()
        pyramid = random_pyramid(SHAPES, VALID_SIZES)
        training = selection(pyramid, heads)
        selection.eval()
        evaluation = selection(pyramid, heads)
        assert not evaluation.proposals
        for field in ("content", "query_pos", "reference"):
            torch.testing.assert_close(getattr(training, field), getattr(evaluation, field))

    def test_what_lies_in_the_padding_does_not_matter(self):
        selection, heads = proposing()
        pyramid = random_pyramid(SHAPES, VALID_SIZES)
        padding = padding_mask(SHAPES, pyramid.valid_sizes)
        garbage = pyramid.tokens.masked_fill(padding[..., None], float("nan"))
        expected, result = (
            selection(pyramid._replace(tokens=tokens), heads)
            for tokens in (pyramid.tokens, garbage)
        )
        assert torch.equal(result.reference, expected.reference)
        logits = [queries.proposals["encoder"].predictions.logits for queries in (result, expected)]
        assert torch.equal(*logits)

    def test_an_image_proposes_the_same_without_its_padding(self):
        selection, heads = proposing()
        # Masked tokens all have one score: low, so that none of them is chosen.
        heads.class_embed[2].weight.data[0] *= 10
        selection.enc_output_norm.bias.data = -heads.class_embed[2].weight.data[0]
        pyramid = random_pyramid(SHAPES, VALID_SIZES)
        padded = selection(pyramid, heads)
        assert (padded.reference < 1.0).all()
        for image in range(2):
            alone = selection(cropped(pyramid, image), heads)
            for field in ("content", "query_pos", "reference"):
                torch.testing.assert_close(
                    getattr(alone, field)[0], getattr(padded, field)[image], rtol=1e-5, atol=1e-5
                )

    @pytest.mark.parametrize("training", [True, False])
    def test_too_few_tokens_are_refused(self, training):
        selection, heads = proposing(num_queries=31)
        selection.train(training)
        message = (
            r"31 queries cannot be chosen from 30 tokens \(levels \(\(4, 6\), \(2, 3\)\)\): "
            "use larger images or fewer num_queries"
        )
        with pytest.raises(ValueError, match=message):
            selection(random_pyramid(SHAPES, VALID_SIZES), heads)

    def test_as_many_queries_as_tokens_are_possible(self):
        """Then the padding is chosen too, and must give finite queries and gradients."""
        selection, heads = proposing(num_queries=30)
        queries = selection(random_pyramid(SHAPES, VALID_SIZES), heads)
        assert all(x.isfinite().all() for x in queries[:3])
        loss = sum(x.sum() for x in (*queries[:2], *queries.proposals["encoder"].predictions))
        loss.backward()
        for parameter in (*selection.parameters(), *heads.bbox_embed[2].parameters()):
            assert parameter.grad.isfinite().all()


class TestEmbedded:
    def queries(self, memory_images: int = 2) -> tuple[EmbeddedQueries, tuple[Tensor, ...]]:
        config = tiny_config(two_stage=False)
        selection = EmbeddedQueries(config)
        pyramid = random_pyramid(SHAPES, VALID_SIZES[:memory_images])
        return selection, selection(pyramid, DetectionHeads(config, 3))

    def test_every_image_gets_the_same(self):
        selection, queries = self.queries()
        weight = selection.query_embed.weight
        assert torch.equal(queries.query_pos, weight[:, :32].expand(2, -1, -1))
        assert torch.equal(queries.content, weight[:, 32:].expand(2, -1, -1))
        reference = selection.reference_points(weight[:, :32]).sigmoid()
        assert torch.equal(queries.reference, reference.expand(2, -1, -1))
        assert not queries.proposals

    def test_reference_points_learn(self):
        selection, queries = self.queries()
        queries.reference.sum().backward()
        assert selection.reference_points.weight.grad.any()

    def test_reference_points_start_without_bias(self):
        selection, _ = self.queries()
        assert not selection.reference_points.bias.any()


class TestAnchorQueries:
    def queries(self, denoising: str = "none") -> tuple[AnchorQueries, Queries]:
        config = tiny_config(two_stage=False, query_position="box", denoising=denoising)
        selection = AnchorQueries(config)
        pyramid = random_pyramid(SHAPES, VALID_SIZES)
        return selection, selection(pyramid, DetectionHeads(config, 3))

    @pytest.mark.parametrize("denoising", ["none", "contrastive", "dn"])
    def test_every_image_gets_the_learned_contents_and_boxes(self, denoising):
        selection, queries = self.queries(denoising)
        content = selection.query_embed.weight
        if denoising == "dn":
            assert content.shape == (4, 31)
            content = torch.cat((content, torch.zeros(4, 1)), dim=1)  # not a denoising query
        assert torch.equal(queries.content, content.expand(2, -1, -1))
        reference = selection.anchors.weight.sigmoid()
        assert torch.equal(queries.reference, reference.expand(2, -1, -1))
        assert queries.query_pos is None
        assert not queries.proposals

    def test_contents_and_boxes_learn(self):
        selection, queries = self.queries("dn")
        (queries.reference.sum() + queries.content.sum()).backward()
        assert selection.anchors.weight.grad.all()
        assert selection.query_embed.weight.grad.all()


class TestContentOfProposals:
    @pytest.mark.parametrize("mixed_selection", [True, False])
    def test_the_token_of_a_proposal_is_added(self, mixed_selection):
        changes = {"mixed_selection": mixed_selection}
        with_token, heads = proposing(proposal_content=True, **changes)
        without, _ = proposing(**changes)
        without.load_state_dict(
            {n: x for n, x in with_token.state_dict().items() if not n.startswith("pix_trans")}
        )
        pyramid = random_pyramid(SHAPES, VALID_SIZES)
        queries, base = (selection(pyramid, heads) for selection in (with_token, without))
        assert torch.equal(queries.reference, base.reference)
        assert torch.equal(queries.query_pos, base.query_pos)
        tokens = with_token.enc_output_norm(with_token.enc_output(pyramid.tokens))
        best = heads.of_encoder().classes(tokens)[..., 0]
        best[padding_mask(SHAPES, pyramid.valid_sizes)] = -float("inf")
        best = best.topk(4, dim=1).indices[..., None].expand(-1, -1, 32)
        added = with_token.pix_trans_norm(with_token.pix_trans(tokens.gather(1, best)))
        torch.testing.assert_close(queries.content, base.content + added)

    def test_the_encoder_does_not_learn_from_it(self):
        selection, heads = proposing(proposal_content=True, mixed_selection=True)
        pyramid = random_pyramid(SHAPES, VALID_SIZES)
        pyramid.tokens.requires_grad_()
        selection(pyramid, heads).content.sum().backward()
        assert pyramid.tokens.grad is None or not pyramid.tokens.grad.any()
        assert selection.pix_trans_norm.bias.grad.any()
        assert selection.enc_output.weight.grad is None
