-- What the scripts below it share: whether whoever sends something is a rank's latest process in the latest run.
-- Takes the head's generation and the rank's claim as stored (false if there is none), and those that were sent.
-- Returns nil if it is; 'superseded' by a newer one; 'behind' if the store has lost the join that it speaks of.
local function refusal(head_generation, stored_claim, generation, claim)
  if head_generation == generation and stored_claim == claim then
    return nil
  end
  local ours, theirs = tonumber(head_generation), tonumber(generation)
  if ours > theirs or (ours == theirs and stored_claim and tonumber(stored_claim) > tonumber(claim)) then
    return 'superseded'
  end
  return 'behind'
end

