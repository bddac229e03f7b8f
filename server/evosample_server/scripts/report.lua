-- Writes losses of one rank, if they belong to the epoch that is open and come from its latest process.
-- KEYS: head, claims, block of losses, ... ARGV: uid, plan_id, generation, rank, claim, then per block: offset, bytes
-- Returns 'ok', 'gone', 'superseded', 'behind' or 'closed'.
local h = redis.call('HMGET', KEYS[1], 'uid', 'plan_id', 'state', 'generation')
if h[1] ~= ARGV[1] then
  return 'gone'
end
local refused = refusal(h[4], redis.call('HGET', KEYS[2], ARGV[4]), ARGV[3], ARGV[5])
if refused then
  return refused
end
if h[2] ~= ARGV[2] or h[3] ~= 'open' then
  return 'closed'
end
for block = 3, #KEYS do
  redis.call('SETRANGE', KEYS[block], ARGV[2 * block], ARGV[2 * block + 1])
end
return 'ok'
