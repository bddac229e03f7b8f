-- Moves the head to a plan whose columns are complete, if it still stands where the planner read it.
-- KEYS: head, plans, epochs, finished, plan, history, turn lock
-- ARGV: uid, epoch, state, plan_id, generation (as read); new epoch, new plan_id, new state, table checksum, steps, hidden
--       steps of these; summary of the epoch that was folded ('' if none was), how many are kept; the spec that the plan was
--       made with ('' if samples were never added); the token of the turn's lock, which is given back ('' if there is none);
--       then the new plan's row counts: field, value, ...
-- The new plan also says without which ranks the epoch before has ended, at most 100.
-- Returns 1, or 0 if another got there first.
local function give_lock_back()
  if redis.call('GET', KEYS[7]) == ARGV[15] then
    redis.call('DEL', KEYS[7])
  end
end
if redis.call('HGET', KEYS[1], 'uid') == ARGV[1] and redis.call('HGET', KEYS[3], ARGV[6]) == ARGV[7] and ARGV[4] ~= ARGV[7] then
  give_lock_back()
  return 1 -- sent again: the first answer got lost
end
local h = redis.call('HMGET', KEYS[1], 'uid', 'epoch', 'state', 'plan_id', 'generation', 'world_size', 'first_step')
for i = 1, 5 do
  if h[i] ~= ARGV[i] then
    return 0
  end
end
local epoch, plan_id, state, table_checksum, num_steps = ARGV[6], ARGV[7], ARGV[8], ARGV[9], ARGV[10]
if redis.call('HEXISTS', KEYS[2], plan_id) == 0 then
  return 0
end
local first_step = h[7]
if epoch ~= h[2] then
  first_step = '0'
  local world_size = tonumber(h[6])
  if redis.call('BITCOUNT', KEYS[4]) < world_size then
    local skipped = {}
    for rank = 0, world_size - 1 do
      if #skipped < 100 and redis.call('GETBIT', KEYS[4], rank) == 0 then
        table.insert(skipped, rank)
      end
    end
    redis.call('HSET', KEYS[5], 'skipped_ranks', table.concat(skipped, ' '))
  end
  redis.call('DEL', KEYS[4])
end
redis.call('HSET', KEYS[1], 'epoch', epoch, 'plan_id', plan_id, 'state', state, 'first_step', first_step,
  'table_checksum', table_checksum, 'num_steps', num_steps, 'num_hidden_steps', ARGV[11], 'finish_began_ms', 0)
redis.call('HSET', KEYS[3], epoch, plan_id)
redis.call('HSET', KEYS[5], 'num_steps', num_steps, unpack(ARGV, 16))
local of_rows = redis.call('HMGET', KEYS[5], 'new_rows', 'skipped_ranks') -- which going back to the plan leaves to it
redis.call('HSET', KEYS[1], 'new_rows', of_rows[1] or '', 'skipped_ranks', of_rows[2] or '')
if ARGV[14] ~= '' then
  redis.call('HSET', KEYS[1], 'spec', ARGV[14])
  redis.call('HSET', KEYS[5], 'spec', ARGV[14])
end
if ARGV[12] ~= '' then
  redis.call('HSET', KEYS[6], h[2], ARGV[12])
  redis.call('HDEL', KEYS[6], string.format('%.0f', h[2] - ARGV[13]))
end
if h[5] ~= '0' then
  redis.call('HSET', KEYS[5], 'generation:' .. h[5], h[6] .. ' ' .. first_step)
end
give_lock_back()
return 1
